"""Scores are called what they are, in pictures, pages and reports, whatever explainer gave them."""

from __future__ import annotations

import html
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import maskhooks
from maskhooks import (
    Attention,
    Beam,
    DiffMask,
    Erasure,
    Explanation,
    GraphMask,
    LeaveOneOut,
    Random,
    Reinforce,
    Rollout,
)
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import (
    ATTENTION,
    ATTRIBUTION,
    BITS,
    DIVERGENCE,
    KEPT_OR_ERASED,
    LOST,
    P_KEPT,
    RANDOM,
    ROLLOUT,
    method_note,
    scale_end,
    score_label,
    zero_note,
)
from maskhooks.sites.site import Site

LABELS = {
    DiffMask: "P(kept)",
    GraphMask: "P(kept)",
    Reinforce: "P(kept)",
    LeaveOneOut: "1 - exp(-divergence)",
    Erasure: "kept (1) or erased (0)",
    Beam: "kept (1) or erased (0)",
    Random: "random score",
    Attention: "attention weight",
    Rollout: "attention rollout",
}
# What is true of masks only.
OF_MASKS = ("can be masked without changing the prediction", "expected fraction kept", "A mask replaces", "P(kept)")
OTHERS = [DIVERGENCE, KEPT_OR_ERASED, RANDOM, ATTENTION, ROLLOUT, ATTRIBUTION, BITS, LOST, "relevance"]


def explained(label: str | None = None, depths: int = 2, start_index: int = 0) -> Explanation:
    """Twelve examples of two predictions and two kinds of token."""
    site = Site.parse("embed:output", "batch token hidden -> batch token")
    valid, words = torch.ones(12, 3, dtype=torch.bool), [["[CLS]", "good", "film"]] * 12
    values = torch.rand(depths, 12, 3, generator=torch.Generator().manual_seed(0))
    return Explanation.build(
        [Scores(site, depth, values[depth], valid, words) for depth in range(depths)],
        provenance={} if label is None else {"score_label": label},
        metadata=[{"prediction": name} for name in ("yes", "no") * 6],
        start_index=start_index,
    )


@pytest.mark.parametrize(("kind", "label"), LABELS.items())
def test_explainers_say_what_their_scores_are(kind: type[Explainer], label: str) -> None:
    assert kind.score_label == label


@pytest.mark.parametrize("kind", [LeaveOneOut, Erasure, Beam, Random])
def test_the_label_goes_with_an_explanation(kind: type[Explainer]) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    hooked = maskhooks.wrap(
        model,
        sites={"0:output": "batch token hidden -> batch token"},
        output=lambda logits: torch.distributions.Categorical(logits=logits),
    )
    explanation = kind(hooked, sites="0:output").explain(torch.tensor([[1, 2], [3, 4]]))  # type: ignore[call-arg]
    assert score_label(explanation.provenance) == LABELS[kind]
    assert f"mean {LABELS[kind]} by depth" in repr(explanation)


@pytest.mark.parametrize("label", [P_KEPT, *OTHERS])
def test_pictures_bear_the_label(label: str) -> None:
    assert explained(label).plot().axes[-1].get_ylabel() == label
    assert explained(label, depths=1).plot(kind="bars").axes[0].get_ylabel() == label


def test_masks_are_the_default() -> None:
    explanation = explained()
    assert score_label(explanation.provenance) == P_KEPT
    assert OF_MASKS[0] in explanation.to_html()
    text = maskhooks.report(explanation=explanation)
    assert all(words in text for words in OF_MASKS)


@pytest.mark.parametrize("label", OTHERS)
def test_pages_and_reports_say_nothing_that_is_true_of_masks_only(label: str) -> None:
    explanation = explained(label)
    for text in (explanation.to_html(), maskhooks.report(explanation=explanation, min_count=1)):
        assert html.escape(label) in text
        assert f'"label":"{label}"' in text  # of tooltips
        assert not [words for words in OF_MASKS if words in text]
    assert "kept" not in explanation._repr_html_().replace(KEPT_OR_ERASED, "")


def test_explanations_with_several_labels_have_scores() -> None:
    parts = [explained(label, start_index=100 * n) for n, label in enumerate((P_KEPT, RANDOM, RANDOM))]
    assert score_label(Explanation.concat(parts[1:]).provenance) == RANDOM
    assert score_label(Explanation.concat(parts).provenance) == "score"
    for one, other in itertools.permutations(parts[:2]):
        text = maskhooks.report(explanation=[one, other], max_examples=1, min_count=1)
        assert "Scores at each depth" in text
        assert OF_MASKS[1] not in text


@pytest.mark.parametrize("label", [ATTENTION, ROLLOUT])
def test_attention_comes_with_a_warning(label: str) -> None:
    assert "need not say what the prediction depends on" in method_note(label)
    assert "may still depend on them" in zero_note(label, "Positions")
    assert "Where does attention go?" in explained(label).to_html()


@pytest.mark.parametrize(
    ("label", "largest", "end"),
    [(P_KEPT, 0.2, 1.0), (ROLLOUT, 0.231, 0.3), (ROLLOUT, 0.3, 0.3), (ROLLOUT, 0.0612, 0.07), (ATTENTION, 0.97, 1.0)],
)
def test_the_scale_of_shares_ends_at_the_largest(label: str, largest: float, end: float) -> None:
    assert scale_end(label, np.array([0.01, largest, np.nan], np.float32)) == end
    assert scale_end(label, np.zeros(3, np.float32)) == 1.0
    assert scale_end(label, np.zeros(0, np.float32)) == 1.0


@pytest.mark.parametrize("kind", ["heatmap", "bars"])
def test_pictures_of_shares_use_the_whole_scale(kind: str) -> None:
    parts = explained(ROLLOUT)
    parts.columns["score"] *= 0.1
    assert parts.plot(kind=kind).axes[0 if kind == "bars" else -1].get_yticks().max() == pytest.approx(
        scale_end(ROLLOUT, parts.select(example=0)["score"])
    )
    assert '"top":0.1' in parts.to_html()
