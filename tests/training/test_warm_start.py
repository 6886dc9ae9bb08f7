"""The warm start: what closing each gate costs, to second order, and probes that learn it before any masked pass."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.utils.checkpoint import checkpoint

import maskhooks
import maskhooks.training.warm_start as starting
from maskhooks import DiffMask
from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import Ranks
from maskhooks.errors import UnknownDistributionError
from maskhooks.masks.group import MaskingGroup
from maskhooks.model.outputs import Positions, kl, sampled_log_prob
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import masked_pass, onward_pass
from maskhooks.seeds import generator
from maskhooks.training.objectives import RatioLagrangian
from maskhooks.training.preparation import gather
from maskhooks.training.warm_start import gate_effects, warm_start
from tests import tiny_runs as runs
from tests.distributed.test_ranks import TWO, same
from tests.masks.test_masking import TOKENS, Tagger
from tests.training.tagger_fits import QUICK, SITES, batches, wrapped

WARM = dataclasses.replace(QUICK, warm_start_batches=3, baseline_steps=0)


class Bag(nn.Module):
    """Classes from the sum of the first feature of all tokens; tokens differ in how large it is."""

    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, x):
        first = self.identity(x)[..., 0].sum(1)
        return torch.stack([first, -first], -1)


class Likeliest(Categorical):
    """Draws the likeliest class."""

    def sample(self, sample_shape=()):
        return self.logits.argmax(-1)


def likeliest(logits):
    return Likeliest(logits=3 * logits)


class Checkpointed(Bag):
    def __init__(self, wrapper):
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x):
        return self.wrapper(super().forward, x)


def bag(count=12, size=16):
    """Batches in which the second feature says which tokens have a large first one."""
    torch.manual_seed(0)
    large = torch.rand(count, size, 6) < 0.3
    first = torch.where(large, 1.5, 0.05) * torch.where(torch.rand(count, size, 1) < 0.5, 1.0, -1.0)
    return list(torch.stack([first, torch.where(large, 1.0, -1.0)], -1))


def hooked_bag(model=None, output=lambda logits: Categorical(logits=logits)):
    sites = {"identity:output": "batch token hidden -> batch token"}
    return maskhooks.wrap(model or Bag(), sites=sites, output=output)


class TestEffects:
    def test_they_are_the_divergence_of_closing_one_gate_a_little(self):
        hooked = wrapped()
        explainer = DiffMask(hooked, SITES[1:3], baseline="mean", recipe=QUICK)
        explainer.fit(batches(), steps=1, progress=False, accelerator="cpu")
        clean = clean_pass(hooked, batches()[0], explainer.reads, explainer.sites)
        for masking in explainer.maskings:
            valid, value = clean.places[masking.site].valid, clean.values[masking.site]
            small = 0.1  # to both sides of z = 1, so that the third order cancels
            expected = torch.zeros(valid.shape)
            for place in range(valid.shape[1]):
                for side in (-small, small):
                    gates = torch.ones(valid.shape)
                    gates[:, place] += side
                    masked = masking.replacement(masking.mask(value, clean.places[masking.site], gates))
                    with torch.no_grad():
                        far = kl(clean.outputs, onward_pass(clean, {masking.site: masked}))
                    expected[:, place] += far / small**2 / 2
            torch.manual_seed(1)
            draws = [gate_effects(clean, explainer.maskings)[masking.site] for _ in range(600)]
            found = torch.stack(draws).mean(0)
            assert (found[~valid] == 0).all()
            assert (found - expected)[valid].abs().sum() < 0.2 * expected[valid].sum()

    def test_a_model_that_recomputes_parts_during_backward(self):
        found = []
        for wrapper in (lambda part, x: part(x), functools.partial(checkpoint, use_reentrant=False)):
            hooked = hooked_bag(Checkpointed(wrapper))
            explainer = DiffMask(hooked, "identity:output", baseline="zero", recipe=WARM)
            explainer.fit(bag(), steps=1, progress=False, accelerator="cpu")
            found.append(explainer.explain(bag()[0])["score"].tolist())
        assert found[0] == found[1]

    @pytest.mark.parametrize(
        "make",
        [
            lambda x: Categorical(logits=x),
            lambda x: {"one": Categorical(logits=x), "two": Normal(x.sum(-1), 1.0)},
            lambda x: Positions(Bernoulli(logits=x), torch.tensor([[True, True, False], [True, False, False]])),
        ],
    )
    def test_the_mean_square_gradient_of_a_sample_is_the_curvature_of_the_divergence(self, make):
        torch.manual_seed(0)
        x, direction = torch.randn(2, 3), torch.randn(2, 3)
        small = torch.zeros(2, requires_grad=True)
        squares = []
        for _ in range(4000):
            (slope,) = torch.autograd.grad(sampled_log_prob(make(x + small[:, None] * direction)).sum(), small)
            squares.append(slope**2)
        expected = 2 * kl(make(x), make(x + 0.01 * direction)) / 0.01**2
        assert torch.allclose(torch.stack(squares).mean(0), expected, rtol=0.25)


class TestWarmStart:
    def fit(self, warm, steps=1):
        recipe = dataclasses.replace(
            maskhooks.Recipe.named("language"), warm_start_batches=warm, warmup_steps=2, learning_rate=1e-2
        )
        explainer = DiffMask(hooked_bag(), "identity:output", baseline="zero", margin=0.05, recipe=recipe)
        return explainer.fit(bag(), steps=steps, progress=False, accelerator="cpu")

    def test_probes_know_what_matters_before_the_first_masked_pass(self):
        batch = bag()[0]
        large = (batch[..., 1] > 0).flatten()
        cold, warm = (torch.tensor(self.fit(n).explain(batch)["score"].tolist()) for n in (0, 12))
        assert cold[large].mean() - cold[~large].mean() < 0.1
        assert warm[large].mean() - warm[~large].mean() > 0.2

    @pytest.mark.parametrize("margin", [0.12, 0.2])
    def test_the_masks_begin_at_the_target(self, margin):
        hooked = hooked_bag()
        recipe = dataclasses.replace(maskhooks.Recipe.named("language"), warm_start_batches=12)
        explainer = DiffMask(hooked, "identity:output", baseline="zero", margin=margin, recipe=recipe)
        problem = explainer._problem()
        gather(hooked, problem.maskings, bag()[:1], torch.device("cpu"))
        problem.objectives[0].start(torch.tensor(1.5))
        warm_start(problem, Epochs(bag(), 0), [1.5], None, Ranks(), progress=False)
        (group,), far = problem.groups, []
        for number, batch in enumerate(bag()):
            clean = clean_pass(hooked, batch, group.reads)
            far.append(kl(clean.outputs, masked_pass(clean, group, generator(number))[1]).mean())
        assert torch.stack(far).mean().item() == pytest.approx(problem.objectives[0].target, rel=0.4)

    def test_two_processes_are_one_with_the_global_batch(self):
        """But for what each draws from the outputs, so here that is no matter of chance."""
        found = []
        recipe = dataclasses.replace(WARM, steps=6)
        for size, devices in ((8, {}), (4, TWO)):
            torch.manual_seed(0)
            sites = dict.fromkeys(runs.SITES, TOKENS)
            hooked = maskhooks.wrap(Tagger(), sites=sites, output=likeliest, valid=runs.padding)
            explainer = DiffMask(hooked, runs.SITES[1:], margin=0.05, recipe=recipe)
            explainer.fit(runs.loader(42, size), steps=12, progress=False, accelerator="cpu", cache=None, **devices)
            found.append(explainer)
        same(*found)

    def test_outputs_that_cannot_be_drawn(self):
        class Point(Distribution):
            arg_constraints = {}  # noqa: RUF012 # as torch names it

        hooked = hooked_bag(output=lambda logits: Point(logits.shape[:1], validate_args=False))
        explainer = DiffMask(hooked, "identity:output", recipe=WARM, divergence=lambda a, b: torch.zeros(16))
        with pytest.raises(UnknownDistributionError, match=r"Point has no `sample` or no `log_prob`.*start cold"):
            explainer.fit(bag(), steps=1, progress=False, accelerator="cpu")

    @pytest.mark.parametrize("far", [torch.inf, torch.nan])
    def test_an_infinite_divergence_starts_cold(self, far):
        hooked = hooked_bag()
        maskings = DiffMask(hooked, "identity:output", baseline="zero", recipe=WARM)
        problem = maskings._problem()
        gather(hooked, problem.maskings, bag()[:1], torch.device("cpu"))
        before = [weight.clone() for part in maskings.parts for weight in part.parameters()]
        warm_start(problem, Epochs(bag(), 0), [far], None, Ranks(), progress=False)
        after = [weight for part in maskings.parts for weight in part.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_objectives_start_once(self, monkeypatch):
        found, original = [], RatioLagrangian.start
        monkeypatch.setattr(RatioLagrangian, "start", lambda *given: found.append(given[1]) or original(*given))
        levelled, level = [], RatioLagrangian.level
        monkeypatch.setattr(RatioLagrangian, "level", lambda *given: levelled.append(given) or level(*given))
        (row,) = self.fit(12).result.log
        assert len(found) == 1
        ((objective, slope),) = levelled
        assert row["multiplier"] == pytest.approx(min(0.2, max(0.05, objective.target / slope)))

    def test_fewer_batches_than_asked_for(self):
        assert self.fit(500).fitted

    def test_the_same_seed_gives_the_same_start(self):
        found = [self.fit(12, steps=3).explain(bag()[0])["score"].tolist() for _ in range(2)]
        assert found[0] == found[1]

    def test_the_model_comes_back(self):
        hooked = wrapped()
        hooked.model.train()
        before = [weight.clone() for weight in hooked.model.parameters()]
        state = torch.get_rng_state()
        recipe = dataclasses.replace(QUICK, warm_start_batches=2)
        DiffMask(hooked, SITES[1], recipe=recipe).fit(batches(), steps=2, progress=False, accelerator="cpu")
        assert hooked.model.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(weight.grad is None and weight.requires_grad for weight in hooked.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, hooked.model.parameters(), strict=True))

    def test_it_ends_when_its_time_is_up(self, monkeypatch):
        read, original = [], gate_effects
        monkeypatch.setattr(starting, "gate_effects", lambda *given: read.append(1) or original(*given))
        monkeypatch.setattr(starting.time, "monotonic", lambda: 10.0 * len(read))
        recipe = dataclasses.replace(maskhooks.Recipe.named("language"), warm_start_batches=12)
        maskings = DiffMask(hooked_bag(), "identity:output", recipe=recipe)
        maskings.groups = maskings._make_groups()
        problem = maskings._problem()
        gather(maskings.hooked, problem.maskings, bag()[:1], torch.device("cpu"))
        problem.objectives[0].start(torch.tensor(1.5))
        warm_start(problem, Epochs(bag(), 0), [1.5], None, Ranks(), progress=False, seconds=45.0)
        assert len(read) == 5

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_masks_start_cold(self, tied):
        explainer = DiffMask(wrapped(), SITES[1:3], recipe=WARM)
        explainer.fit(batches(), steps=1, progress=False, accelerator="cpu")
        explainer.groups = [MaskingGroup(explainer.maskings, tied=tied)]
        problem = explainer._problem()
        before = [weight.clone() for masking in explainer.maskings for weight in masking.votes[0].probe.parameters()]
        warm_start(problem, Epochs(batches(), 0, 0, 1), [1.0], None, Ranks(), False)
        after = [weight for masking in explainer.maskings for weight in masking.votes[0].probe.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)) is tied

    def test_masks_that_share_votes(self):
        recipe = dataclasses.replace(QUICK, warm_start_batches=3, baseline_steps=0)
        explainer = DiffMask(wrapped(), SITES[0], conditioned_on=SITES[1:], margin=5.0, recipe=recipe)
        assert explainer.fit(batches(), steps=6, progress=False, accelerator="cpu").fitted
