"""Free logits: several starts, cooling gates, and gradients from samples alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import DiffMask, Hooked, Recipe, Reinforce
from maskhooks.errors import SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.masks.probes import PerExampleLogits
from maskhooks.model.outputs import kl, lost_lead
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.seeds import generator
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.training.per_example import Chosen, ScoreFunction, begin

SMALLEST = {0: [{2}], 1: [{0, 1}], 2: [{0}]}
SUBSET = dataclasses.replace(Recipe.named("subset"), restarts=8, steps=60, logit_learning_rate=0.5)


class Votes(nn.Module):
    """Two classes; what an example's positions add to the first one's lead, above a bias against it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, votes: Tensor) -> Categorical:
        lead = (self.weight * votes).sum((1, 2)) - 1
        return Categorical(logits=torch.stack([lead, torch.zeros_like(lead)], 1))


@pytest.fixture
def batch() -> Tensor:
    return torch.tensor([[0.4, 0.5, 1.5, 0.3], [0.8, 0.7, -0.2, 0.1], [2.0, -2.0, 0.5, 0.9]])[..., None]


@pytest.fixture
def hooked() -> Hooked:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.votes = nn.Identity(), Votes()

        def forward(self, votes: Tensor) -> Categorical:
            found: Categorical = self.votes(self.inputs(votes))
            return found

    return maskhooks.wrap(Model(), sites={"inputs:output": "batch token vote -> batch token"})


def kept(explainer: Explainer, batch: Any) -> list[set[int]]:
    rows = explainer.explain(batch).select()
    chosen = zip(rows["example"], rows["position"], rows["kept"], strict=True)
    sets: list[set[int]] = [set() for _ in batch]
    for example, position, is_kept in chosen:
        if is_kept:
            sets[example].add(int(position))
    return sets


@pytest.mark.parametrize("kind", [functools.partial(DiffMask, amortized=False), Reinforce])
def test_the_smallest_sets_are_found(hooked: Hooked, batch: Tensor, kind: Callable[..., Explainer]) -> None:
    explainer = kind(hooked, "hidden", divergence=lost_lead, margin=0.02, recipe=SUBSET)
    assert all(found in SMALLEST[example] for example, found in enumerate(kept(explainer, batch)))


def test_each_example_keeps_the_sparsest_start_within_the_margin_or_the_nearest() -> None:
    probe = PerExampleLogits()
    probe.start([], 1)
    probe.begin([4, 2], torch.device("cpu"))

    def chosen(logit: float, far: list[float], kept: list[float]) -> Chosen:
        return Chosen([(probe, None)], [torch.full((4, 2, 1), logit)], torch.tensor(far), torch.tensor(kept))

    first = chosen(1.0, far=[0.0, 0.0, 0.3, 0.2], kept=[0.5, 0.5, 0.1, 0.1])
    best = first.or_better(chosen(2.0, far=[0.0, 0.1, 0.0, 0.3], kept=[0.4, 0.1, 0.9, 0.1]))
    best.put()
    assert probe.logits[:, 0, 0].tolist() == [2.0, 1.0, 2.0, 1.0]
    assert best.kept.tolist() == pytest.approx([0.4, 0.5, 0.9, 0.1])
    nearer = best.or_better(chosen(3.0, far=[0.0, 0.0, 0.0, 0.1], kept=[0.4, 0.6, 0.9, 0.9]))
    assert nearer.logits[0][:, 0, 0].tolist() == [2.0, 1.0, 2.0, 3.0]


def test_rows_of_many_examples_follow_theirs() -> None:
    probe = PerExampleLogits()
    probe.start([], 1)
    probe.begin([5], torch.device("cpu"))
    rows = [(probe, ExampleIndex(torch.tensor([1, 0, 1, 1, 0]), 2))]
    first = Chosen(rows, [torch.zeros(5, 1)], torch.zeros(2), torch.tensor([0.5, 0.5]))
    second = Chosen(rows, [torch.ones(5, 1)], torch.zeros(2), torch.tensor([0.6, 0.4]))
    assert first.or_better(second).logits[0][:, 0].tolist() == [1, 0, 1, 1, 0]


def test_starts_are_drawn_and_stay_in_range() -> None:
    probe = PerExampleLogits(init_logit=0.0, init_std=3.0, min_logit=-5.0, max_logit=5.0)
    probe.start([], 2)
    probe.begin([40, 50], torch.device("cpu"), generator(0))
    logits = probe.logits.detach()
    assert logits.shape == (40, 50, 2)
    assert logits.abs().max() == 5.0
    assert logits.std() == pytest.approx(2.7, abs=0.2)
    probe.begin([40, 50], torch.device("cpu"), generator(1))
    assert not torch.equal(logits, probe.logits)


def test_gates_cool_down_to_their_own_temperature(hooked: Hooked, batch: Tensor) -> None:
    explainer = DiffMask(hooked, "hidden", amortized=False, margin=5.0, recipe=dataclasses.replace(SUBSET, steps=3))
    seen = []
    (masking,) = explainer.maskings
    sample = type(masking.gate).sample

    class Watched(type(masking.gate)):  # type: ignore[misc] # a gate that says how hot it is
        def sample(self, *args: Any) -> Tensor:
            seen.append(self.temperature)
            found: Tensor = sample(self, *args)
            return found

    masking.gate = own = Watched()
    explainer.explain(batch)
    assert seen[:3] == pytest.approx([1.0, 0.2 * 5 ** (2 / 3), 0.2 * 5 ** (1 / 3)])
    assert masking.gate is own


def test_the_score_function_is_unbiased(hooked: Hooked, batch: Tensor) -> None:
    """Its mean gradient is that of the expected penalty, found by going through all masks."""
    recipe, copies = dataclasses.replace(SUBSET, logit_init_std=0.5), 500
    explainer = Reinforce(hooked, "hidden", margin=0.1, recipe=recipe)
    clean = clean_pass(hooked, batch.repeat(copies, 1, 1), explainer.reads)
    problem = explainer._problem()
    (group,) = explainer.groups
    begin(group, clean, generator(4))
    probe = group.maskings[0].votes[0].probe
    probe.logits.data = probe.logits.data[:3].repeat(copies, 1, 1)
    exact = _exact_gradient(explainer, clean_pass(hooked, batch, explainer.reads), probe.logits.data[:3])
    estimate, draws = ScoreFunction(), 6
    for draw in range(draws):
        with torch.enable_grad(), contextlib.ExitStack() as held:
            _, _, penalty = estimate(problem, clean, group, generator(9, draw), held)
            penalty.sum().backward()
    found = probe.logits.grad.view(copies, 3, 4, 1).mean(0) / draws
    assert torch.allclose(found, exact, atol=0.02)
    assert exact.abs().max() > 0.06


def _exact_gradient(explainer: Reinforce, clean: Clean, logits: Tensor) -> Tensor:
    (masking,) = explainer.maskings
    value = clean.values[masking.site]
    free = logits.detach().clone().requires_grad_()
    expected = torch.zeros(())
    for mask in itertools.product([0.0, 1.0], repeat=4):
        sample = torch.tensor(mask).expand(3, 4)
        outputs = Categorical(logits=explainer.hooked.model(value * sample[..., None]).logits)
        penalty = kl(clean.outputs, outputs).detach()
        expected = expected + (penalty * masking.gate.log_prob(sample, free[..., 0]).sum(1).exp()).sum()
    (gradient,) = torch.autograd.grad(expected, free)
    return gradient


def test_what_reinforce_refuses(hooked: Hooked) -> None:
    with pytest.raises(SettingError, match="Reinforce has no setting 'amortized'"):
        Reinforce(hooked, amortized=True)  # type: ignore[call-arg] # there is nothing to choose
    with pytest.raises(SettingError, match="ema_decay must be a number from 0 and below 1, got 1"):
        Reinforce(hooked, ema_decay=1.0)
    with pytest.raises(SettingError, match="restarts must be a whole number from 1"):
        Recipe(restarts=0)
