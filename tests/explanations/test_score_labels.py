"""Scores are called what they are, in pictures, pages and reports, whatever explainer gave them."""

from __future__ import annotations

import html
import itertools

import pytest
import torch
from torch import nn

import maskhooks
from maskhooks import Beam, DiffMask, Erasure, Explanation, GraphMask, LeaveOneOut, Random, Reinforce
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import ATTRIBUTION, DIVERGENCE, KEPT_OR_ERASED, P_KEPT, RANDOM, score_label
from maskhooks.sites.site import Site

LABELS = {
    DiffMask: "P(kept)",
    GraphMask: "P(kept)",
    Reinforce: "P(kept)",
    LeaveOneOut: "1 - exp(-divergence)",
    Erasure: "kept (1) or erased (0)",
    Beam: "kept (1) or erased (0)",
    Random: "random score",
}
# What is true of masks only.
OF_MASKS = ("can be masked without changing the prediction", "expected fraction kept", "A mask replaces", "P(kept)")
OTHERS = [DIVERGENCE, KEPT_OR_ERASED, RANDOM, ATTRIBUTION, "relevance"]


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
