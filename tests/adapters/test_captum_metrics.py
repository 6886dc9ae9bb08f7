"""Captum's metrics of any scores: by hand, and as Captum computes them on a plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Explanation, Hooked, LeaveOneOut, Random
from maskhooks.errors import SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.metrics.judgement import judge
from tests.metrics import small

captum = pytest.importorskip("captum.metrics")
from maskhooks_captum.gradients import InputXGradient, IntegratedGradients  # noqa: E402
from maskhooks_captum.metrics import Infidelity, SensitivityMax  # noqa: E402

BATCHES = [small.batch(), small.batch((5, 7), seed=1)]
PLAIN = {"normalize": False, "relative": False}


def values(explanation: Explanation, metric: Any, explainer: Explainer | None = None, **options: Any) -> Any:
    hooked = options.pop("hooked", None) or (explainer and explainer.hooked)
    (found,) = judge(explanation, metric, hooked=hooked, batches=BATCHES, explainer=explainer, **options)
    return found.values


def rows(explanation: Explanation, example: int) -> Any:
    here = explanation.select(example=example)
    return here["score"][here["valid"] & (here["label"] != "[CLS]")].astype(np.float64)


def test_infidelity_by_hand_over_all_sets() -> None:
    """With many samples the mean over random sets is near that over all of them, each as likely."""
    network = small.model()
    hooked = small.hooked(network)
    explanation = LeaveOneOut(hooked, small.SITE).explain_all(BATCHES)
    scaled, plain = (
        values(explanation, Infidelity(n_samples=500, **settings), hooked=hooked) for settings in ({}, PLAIN)
    )
    for example in (1, 2):  # two and three positions that count
        ids = BATCHES[0][0][example][: small.LENGTHS[example]]
        scores = rows(explanation, example)
        whole = small.probabilities(network, ids, ())
        j = int(whole.argmax())
        sums, changes = [], []
        for code in range(2 ** len(scores)):
            taken = [number for number in range(len(scores)) if code >> number & 1]
            sums.append(scores[taken].sum())
            changes.append(float((whole - small.probabilities(network, ids, [one + 1 for one in taken]))[j]))
        s, d = np.array(sums), np.array(changes)
        scale = (s * d).sum() / (s * s).sum()
        assert plain[example] == pytest.approx(((s - d) ** 2).mean(), rel=0.25)
        assert scaled[example] == pytest.approx(((scale * s - d) ** 2).sum() / (d * d).sum(), rel=0.4, abs=0.02)


class Linear(nn.Module):
    """A class's probability that is nearly linear in the inputs, so that gradients times inputs are right."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.last = nn.Identity(), nn.Linear(6, 2)
        with torch.no_grad():
            self.last.weight.mul_(0.01)
            self.last.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.site(x))
        return result


def table(model: nn.Module) -> Hooked:
    return maskhooks.wrap(
        model,
        sites={"site:output": "batch feature -> batch feature, feature=6"},
        output=lambda logits: Categorical(logits=logits),
    )


def test_gradients_of_a_linear_model_are_faithful_and_random_scores_are_not() -> None:
    torch.manual_seed(0)
    hooked, x = table(Linear()), torch.randn(5, 6)
    for explainer in (IntegratedGradients(hooked, "site:output", output="prob"), Random(hooked, "site:output")):
        (found,) = judge(explainer.explain(x), "infidelity", hooked=hooked, batches=[x])
        assert bool((found.values < 1e-3).all()) == (explainer.name != "random")
        assert bool((found.values <= 1 + 1e-6).all())


def test_the_sign_is_lost_only_when_scaled() -> None:
    torch.manual_seed(0)
    hooked, x = table(Linear()), torch.randn(5, 6)
    explanation = InputXGradient(hooked, "site:output", output="prob").explain(x)
    flipped = explanation.select()
    flipped.columns["score"] = -explanation["score"]
    for settings, same in (({}, True), (PLAIN, False)):
        one, other = (
            judge(each, Infidelity(**settings), hooked=hooked, batches=[x])[0].values for each in (explanation, flipped)
        )
        assert np.allclose(one, other, atol=1e-5 if same else 1e-9) == same


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already:UserWarning")
def test_sensitivity_as_captum_computes_it_on_a_plain_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    hooked = maskhooks.wrap(
        model,
        sites={"0:output": "batch feature -> batch feature, feature=6"},
        output=lambda logits: Categorical(logits=logits),
    )
    x = torch.randn(4, 6)
    explainer = InputXGradient(hooked, "0:output", target=1)
    explanation = explainer.explain(x)
    metric = SensitivityMax(radius=0.1, n_samples=60)
    found = judge(explanation, metric, hooked=hooked, batches=[x], explainer=explainer)[0].values
    import captum.attr

    for number, row in enumerate(x[:, None]):
        radius = 0.1 * row.square().mean().sqrt().item()
        torch.manual_seed(1)
        wanted = captum.metrics.sensitivity_max(
            captum.attr.InputXGradient(model).attribute, row, perturb_radius=radius, n_perturb_samples=60, target=1
        )
        assert found[number] == pytest.approx(wanted.item(), rel=0.3)  # other draws


@pytest.mark.parametrize("site", [small.SITE, "first:output"])
def test_explainers_of_copies_see_the_moved_value(site: str) -> None:
    hooked = small.hooked()
    explainer = LeaveOneOut(hooked, site)
    explanation = explainer.explain_all(BATCHES)
    small_radius, large_radius = (
        values(explanation, SensitivityMax(radius=radius, n_samples=5), explainer) for radius in (1e-3, 1e-1)
    )
    assert bool((small_radius > 0).all())
    assert bool((large_radius > 10 * small_radius).all())
    assert (
        values(explanation, SensitivityMax(n_samples=3), explainer).tolist()
        == values(explanation, SensitivityMax(n_samples=3), explainer).tolist()
    )


def test_random_scores_do_not_move() -> None:
    explainer = Random(small.hooked(), small.SITE)
    assert values(explainer.explain_all(BATCHES), "sensitivity-max", explainer).tolist() == [0.0] * 6


def test_what_they_need() -> None:
    hooked = small.hooked()
    explanation = Random(hooked, small.SITE).explain_all(BATCHES)
    with pytest.raises(SettingError, match="needs the explainer"):
        values(explanation, "sensitivity-max", hooked=hooked)
    with pytest.raises(SettingError, match="needs the wrapped model"):
        judge(explanation, "infidelity")
    with pytest.raises(SettingError, match="radius must be a number above 0"):
        SensitivityMax(radius=0.0)
