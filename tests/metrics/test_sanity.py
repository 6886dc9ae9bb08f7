"""Scores of random weights: what is compared, and that the model comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from maskhooks import IBA, DiffMask, Explanation, Hooked, LeaveOneOut, Random
from maskhooks.errors import SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.metrics.judgement import Judgement, judge
from maskhooks.metrics.sanity import randomised
from tests.metrics import small

BATCHES = [small.batch(), small.batch((5, 7), seed=1)]
NAME = "randomised-weights"


def judged(explainer: Explainer, metric: Any = NAME, **options: Any) -> Judgement:
    explanation = explainer.explain_all(BATCHES)
    (found,) = judge(explanation, metric, hooked=explainer.hooked, batches=BATCHES, explainer=explainer, **options)
    return found


def by_hand(explainer: Explainer, share: float, absolute: bool) -> list[float]:
    """Each example's rank correlation, from two explanations of its own."""
    before = explainer.explain_all(BATCHES)
    with randomised(explainer.hooked.model, share):
        after = explainer.explain_all(BATCHES)
    found = []
    for example in range(6):
        rows = [_rows(one, example) for one in (before, after)]
        found.append(spearmanr(*(np.abs(one) if absolute else one for one in rows)).statistic)
    return found


def _rows(explanation: Explanation, example: int) -> Any:
    here = explanation.select(example=example)
    return here["score"][here["valid"] & (here["label"] != "[CLS]")]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_correlation_with_the_scores_of_random_weights(share: float, absolute: bool) -> None:
    explainer = LeaveOneOut(small.hooked(), small.SITE)
    metric = {"name": NAME, "share": share, "absolute": absolute}
    found = judged(explainer, metric)
    assert found.values == pytest.approx(by_hand(explainer, share, absolute), abs=1e-6)
    assert found.metric.better == "lower"


def test_what_does_not_look_at_the_model_does_not_change() -> None:
    assert judged(Random(small.hooked(), small.SITE)).values == pytest.approx(1.0)
    assert abs(judged(LeaveOneOut(small.hooked(), small.SITE)).mean) < 0.9


class Odd(nn.Module):
    """Tied weights, a norm with statistics, a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x))) * self.scale[0]
        return result


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back(fails: bool) -> None:
    model = Odd().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, x = torch.get_rng_state(), torch.randn(3, 4)
    usual = model(x)
    state = torch.get_rng_state()
    try:
        with randomised(model):
            assert not torch.equal(model(x), usual)
            assert not torch.equal(model.scale, torch.tensor([2.0, 3.0]))
            assert model.last.weight is model.first.weight
            assert bool((model.norm.running_mean == 0).all())  # type: ignore[union-attr]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(x), usual)


def test_the_last_modules_come_first() -> None:
    model = small.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with randomised(model, 1 / 3):
        changed = {name.split(".")[0] for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {"last"}


def test_two_seeds_draw_other_weights() -> None:
    explainer = LeaveOneOut(small.hooked(), small.SITE)
    one, again, other = (judged(explainer, {"name": NAME, "seed": seed}).values.tolist() for seed in (0, 0, 1))
    assert one == again != other


MAKE: dict[str, Callable[[Hooked], Explainer]] = {
    "iba": lambda hooked: IBA(hooked, small.SITE),
    "diffmask": lambda hooked: DiffMask(hooked, small.SITE, amortized=False, recipe={"name": "stable", "steps": 3}),
}


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("name", MAKE)
def test_statistics_are_fitted_anew_and_the_explainer_stays(name: str) -> None:
    explainer = MAKE[name](small.hooked()).fit(BATCHES)
    parts = [part.clone() for module in explainer.parts for part in module.state_dict().values()]  # type: ignore[attr-defined]
    before = explainer.explain(BATCHES[0])["score"]
    judged(explainer)
    after = [part for module in explainer.parts for part in module.state_dict().values()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, parts, after))
    assert (explainer.explain(BATCHES[0])["score"] == before).all()


def test_trained_masks_are_refused() -> None:
    explainer = DiffMask(small.hooked(), small.SITE, recipe={"name": "stable", "steps": 3}).fit(BATCHES, progress=False)
    with pytest.raises(SettingError, match="trained in advance, on the weights"):
        judged(explainer)


def test_what_is_needed() -> None:
    hooked = small.hooked()
    explanation = LeaveOneOut(hooked, small.SITE).explain_all(BATCHES)
    with pytest.raises(SettingError, match="needs the explainer that made the explanation"):
        judge(explanation, NAME, hooked=hooked, batches=BATCHES)
    other = LeaveOneOut(small.hooked(), small.SITE)
    with pytest.raises(SettingError, match="explainer is of another model"):
        judge(explanation, NAME, hooked=hooked, batches=BATCHES, explainer=other)
