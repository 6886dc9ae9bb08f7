"""Every registered part passes the list of its kind, a third-party one too."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Bernoulli, Categorical

from maskhooks import Explanation, LeaveOneOut, Random, Recipe, wrap
from maskhooks.errors import SettingError
from maskhooks.masks.baselines import BASELINES, Baseline
from maskhooks.masks.gates import GATES, Gate
from maskhooks.masks.mix import mix
from maskhooks.masks.probes import PROBES, Probe
from maskhooks.masks.samples import GateSamples
from maskhooks.metrics.judgement import judge
from maskhooks.metrics.metric import METRICS, Metric
from maskhooks.model.outputs import DIVERGENCES, Divergence, Outputs, Positions
from maskhooks.plugins.kind import Kind
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import schema_of
from maskhooks.training.objectives import OBJECTIVES, Objective
from maskhooks.training.optimizers import OPTIMIZERS
from maskhooks.training.penalty import PENALTIES, Penalty
from maskhooks.training.recipe import RECIPES
from tests.conftest import same_bits
from tests.contract.conftest import registered
from tests.metrics import small

pytestmark = pytest.mark.usefixtures("third_party")

LOGITS = [-20.0, -4.0, -0.5, 0.0, 0.5, 4.0, 20.0]
COUNT = 20_000


@pytest.fixture(autouse=True)
def _global_state_stays() -> Iterator[None]:
    """No part draws from the global generator when it is given one of its own, or none is needed."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


class TestGates:
    @pytest.fixture(params=registered(GATES))
    def gate(self, request: pytest.FixtureRequest) -> Gate:
        found: Gate = registry.make(GATES, request.param)
        return found

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_float32_of_the_logits_shape(self, gate: Gate, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        logits = torch.full(shape, 0.3, dtype=dtype)
        sample = gate.sample(logits, source())
        for found in (sample, gate.log_open(logits), gate.log_prob(sample, logits), gate.probability(logits)):
            assert found.shape == shape
            assert found.dtype == torch.float32

    @pytest.mark.parametrize("logit", LOGITS)
    def test_samples_and_probabilities_lie_in_the_unit_interval(self, gate: Gate, logit: float) -> None:
        logits = torch.full((COUNT,), logit)
        for found in (gate.sample(logits, source()), gate.probability(logits)):
            assert found.min() >= 0
            assert found.max() <= 1

    @pytest.mark.parametrize("logit", LOGITS)
    def test_log_open_is_the_share_of_samples_that_are_not_zero(self, gate: Gate, logit: float) -> None:
        logits = torch.full((COUNT,), logit)
        share = (gate.sample(logits, source()) != 0).double().mean().item()
        p = gate.log_open(logits[:1]).double().exp().item()
        assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / COUNT) + 1e-6)
        assert gate.probability(logits[:1]).item() == pytest.approx(p, abs=1e-6)

    @pytest.mark.parametrize("logit", LOGITS)
    def test_a_gates_own_samples_are_possible(self, gate: Gate, logit: float) -> None:
        logits = torch.full((COUNT,), logit)
        assert gate.log_prob(gate.sample(logits, source()), logits).isfinite().all()

    @pytest.mark.parametrize("logit", LOGITS)
    def test_the_mass_at_zero_is_what_is_not_open(self, gate: Gate, logit: float) -> None:
        logits = torch.tensor([logit])
        closed = gate.log_prob(torch.zeros(1), logits).exp() + gate.probability(logits)
        assert closed.item() == pytest.approx(1, abs=1e-5)

    def test_a_higher_logit_is_never_less_open(self, gate: Gate) -> None:
        p = gate.probability(torch.linspace(-10, 10, 201))
        assert (p.diff() >= 0).all()
        assert p[-1] - p[0] > 0.9

    def test_the_gradient_of_a_sample_reaches_the_logits(self, gate: Gate) -> None:
        logits = torch.linspace(-2, 2, 500).requires_grad_()
        gate.sample(logits, source()).sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad > 0).any()

    def test_a_generator_says_which_sample(self, gate: Gate) -> None:
        logits = torch.zeros(100)
        assert same_bits(gate.sample(logits, source()), gate.sample(logits, source()))

    def test_its_middle_is_where_it_is_open_half_the_time(self, gate: Gate) -> None:
        assert gate.probability(torch.tensor([gate.middle])).item() == pytest.approx(0.5, abs=1e-6)

    def test_it_is_spelt_and_made_again(self, gate: Gate) -> None:
        spelt = registry.spell(GATES, gate)
        assert spelt is not None
        again: Gate = registry.make(GATES, spelt)
        assert type(again) is type(gate)
        assert again.settings() == gate.settings()
        logits = torch.linspace(-2, 2, 100)
        assert same_bits(again.sample(logits, source()), gate.sample(logits, source()))


class TestBaselines:
    SETTINGS: dict[str, Any] = {"token": lambda shape: {"value": torch.full(shape, 0.25)}}  # noqa: RUF012

    @pytest.fixture(params=registered(BASELINES))
    def name(self, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    @pytest.fixture(params=[(5,), (2, 3), ()], ids=str)
    def shape(self, request: pytest.FixtureRequest) -> tuple[int, ...]:
        found: tuple[int, ...] = request.param
        return found

    def started(self, name: str, shape: tuple[int, ...]) -> Baseline:
        made: Baseline = registry.make(BASELINES, name, **self.SETTINGS.get(name, lambda shape: {})(shape))
        made.start(shape)
        return made

    def fitted(self, name: str, shape: tuple[int, ...]) -> Baseline:
        baseline = self.started(name, shape)
        for number in range(2):
            baseline.fit(values(shape, number))
        return baseline

    def test_it_has_its_shape_before_and_after_a_fit(self, name: str, shape: tuple[int, ...]) -> None:
        for baseline in (self.started(name, shape), self.fitted(name, shape)):
            found = baseline()
            assert found.shape == shape
            assert found.dtype == torch.float32
            assert found.isfinite().all()

    def test_no_values_change_nothing(self, name: str, shape: tuple[int, ...]) -> None:
        baseline = self.fitted(name, shape)
        before = baseline().detach().clone()
        baseline.fit(torch.empty(0, *shape))
        assert same_bits(baseline(), before)

    def test_half_precision_values_are_taken(self, name: str, shape: tuple[int, ...]) -> None:
        baseline = self.started(name, shape)
        baseline.fit(values(shape, 0).bfloat16())
        torch.testing.assert_close(baseline(), self.fitted_once(name, shape)(), rtol=1e-2, atol=1e-2)
        assert baseline().dtype == torch.float32

    def fitted_once(self, name: str, shape: tuple[int, ...]) -> Baseline:
        baseline = self.started(name, shape)
        baseline.fit(values(shape, 0))
        return baseline

    def test_values_are_not_changed(self, name: str, shape: tuple[int, ...]) -> None:
        given = values(shape, 0)
        self.started(name, shape).fit(given)
        assert same_bits(given, values(shape, 0))

    def test_a_state_is_taken_over(self, name: str, shape: tuple[int, ...]) -> None:
        baseline = self.fitted(name, shape)
        for weight in baseline.parameters():
            weight.data.add_(1)  # as training would
        twin = self.started(name, shape)
        twin.load_state_dict({key: tensor.clone() for key, tensor in baseline.state_dict().items()})
        assert same_bits(twin(), baseline())
        for each in (baseline, twin):  # and fitting goes on from there
            each.fit(values(shape, 7))
        assert same_bits(twin(), baseline())

    def test_its_weights_are_on_the_path_of_the_gradient(self, name: str, shape: tuple[int, ...]) -> None:
        baseline = self.fitted(name, shape)
        if not list(baseline.parameters()):
            assert not baseline().requires_grad
            return
        baseline().sum().backward()
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in baseline.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_closed_gate_lets_it_through(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        value, baseline = values(shape, 3).to(dtype), self.fitted(name, shape)()
        replaced = mix(value, torch.zeros(len(value), *[1] * len(shape)), baseline)
        assert same_bits(replaced, baseline.to(dtype).expand_as(value))


def test_a_token_without_its_vector() -> None:
    with pytest.raises(SettingError, match="needs the token's vector"):
        registry.make(BASELINES, "token").start((3,))


class TestProbes:
    """Two reads of 3 and 5 features at 4 by 6 positions, and two gates at each."""

    FEATURES, GROUPS = (3, 5), 2

    @pytest.fixture(params=registered(PROBES))
    def name(self, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    @pytest.fixture
    def probe(self, name: str) -> Probe:
        return self.started(name)

    def started(self, name: str) -> Probe:
        made = registry.make(PROBES, name)
        with torch.random.fork_rng():  # weights are drawn at random
            torch.manual_seed(1)
            made.start(self.FEATURES, self.GROUPS)
        made.fit([read.flatten(0, 1) for read in self.reads()])
        return made

    def reads(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(4, 6, size, generator=source()).to(dtype) for size in self.FEATURES]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_a_finite_float32_logit_for_each_gate(self, probe: Probe, dtype: torch.dtype) -> None:
        logits = probe(self.reads(dtype))
        assert logits.shape == (4, 6, self.GROUPS)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    def test_masks_begin_open(self, probe: Probe) -> None:
        """A gate that begins closed gets no gradient that could open it."""
        assert registry.make(GATES, "hard-concrete").probability(probe(self.reads())).mean() > 0.5

    def test_the_gradient_reaches_the_weights(self, probe: Probe) -> None:
        probe(self.reads()).sum().backward()
        gradients = [weight.grad for weight in probe.parameters() if weight.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient.abs().sum() for gradient in gradients) > 0

    def test_training_tells_positions_apart(self, probe: Probe) -> None:
        """One Adam run on logits that follow the first feature: they are ordered as it is."""
        reads = self.reads()
        wanted = (reads[0][..., :1] > 0).expand(-1, -1, self.GROUPS).float()
        optimizer = torch.optim.Adam(probe.parameters(), lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(probe(reads), wanted).backward()
            optimizer.step()
        logits = probe(reads)
        assert logits[wanted == 1].mean() > logits[wanted == 0].mean() + 1

    @torch.no_grad()
    def test_sharpening_stretches_logits_about_the_middle_or_leaves_them(self, probe: Probe) -> None:
        before = probe(self.reads())
        probe.sharpen(2.0, 0.5)
        probe.sharpen(1.5, 0.5)
        after = probe(self.reads())
        stretched = torch.allclose(after - 0.5, 3 * (before - 0.5), atol=1e-5)
        assert stretched or (same_bits(before, after) and type(probe).sharpen is Probe.sharpen)

    def test_values_are_not_changed(self, probe: Probe) -> None:
        reads = self.reads()
        probe(reads)
        assert all(same_bits(one, other) for one, other in zip(reads, self.reads(), strict=True))

    def test_a_state_is_taken_over(self, name: str, probe: Probe) -> None:
        for weight in probe.parameters():
            weight.data.add_(0.1)
        twin = registry.make(PROBES, name)
        with torch.random.fork_rng():
            twin.start(self.FEATURES, self.GROUPS)
        twin.load_state_dict(probe.state_dict())
        assert same_bits(twin(self.reads()), probe(self.reads()))


class TestObjectives:
    MARGIN = 0.2

    @pytest.fixture(params=["one", "each"])
    def closed(self, request: pytest.FixtureRequest) -> Tensor:
        """The divergence with all closed: a multiplier for the batch, or one for each example."""
        return torch.tensor(1.5) if request.param == "one" else torch.tensor([1.5, 0.1, 3.0])

    @pytest.fixture(params=registered(OBJECTIVES))
    def objective(self, request: pytest.FixtureRequest, closed: Tensor) -> Objective:
        made = registry.make(OBJECTIVES, request.param, {"margin": self.MARGIN})
        made.start(closed)
        return made

    def test_the_multiplier_is_a_finite_float32(self, objective: Objective, closed: Tensor) -> None:
        assert objective.multiplier.shape == closed.shape
        assert objective.multiplier.dtype == torch.float32
        assert objective.multiplier.isfinite().all()
        assert objective.margin == self.MARGIN

    def test_the_loss_pulls_at_gates_and_divergence(self, objective: Objective) -> None:
        logits = torch.full((3, 4), 1.0, requires_grad=True)
        divergence = torch.full((3,), 0.5, requires_grad=True)
        loss = objective(open_gates(logits), divergence.detach(), divergence)
        assert loss.shape == ()
        loss.backward()
        assert logits.grad is not None
        assert (logits.grad > 0).all()  # closing gates lowers the loss
        assert divergence.grad is not None
        assert (divergence.grad > 0).all()  # and so does a smaller penalty

    @pytest.mark.parametrize(("divergence", "sign"), [(2.0, 1), (0.0, -1)], ids=["beyond", "within"])
    def test_the_multiplier_rises_beyond_the_margin_and_falls_within(
        self, objective: Objective, divergence: float, sign: int
    ) -> None:
        before, found = objective.multiplier.clone(), torch.full((3,), divergence)
        for _ in range(20):
            objective(open_gates(torch.zeros(3, 4)), found, found)
            objective.ascend(found)
        assert ((objective.multiplier - before) * sign > 0).all()

    @pytest.mark.parametrize("divergence", [0.0, 1e-6, 0.2, 1e3])
    def test_the_multiplier_stays_finite_and_is_never_negative(self, objective: Objective, divergence: float) -> None:
        for _ in range(200):
            objective.ascend(torch.full((3,), divergence))
            assert objective.multiplier.isfinite().all()
            assert (objective.multiplier >= 0).all()
        loss = objective(open_gates(torch.zeros(3, 4)), torch.full((3,), divergence), torch.full((3,), divergence))
        assert loss.isfinite()

    def test_its_state_is_taken_over(self, objective: Objective, closed: Tensor) -> None:
        twin = type(objective)(self.MARGIN)
        twin.start(closed)
        objective.ascend(torch.full((3,), 0.9))
        twin.load_state_dict(objective.state_dict())
        for each in (objective, twin):
            each.ascend(torch.full((3,), 0.7))
        assert same_bits(twin.multiplier, objective.multiplier)


class TestPenalties:
    @pytest.fixture(params=registered(PENALTIES))
    def name(self, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    @pytest.fixture
    def penalty(self, name: str) -> Penalty:
        return self.made(name)

    def made(self, name: str) -> Penalty:
        return registry.make(PENALTIES, name, {"flip_penalty": 0.5, "balance": True})

    def test_it_charges_each_example_and_passes_the_gradient(self, penalty: Penalty) -> None:
        original, masked = classes(0), classes(1)
        penalty.fit(original)
        divergence = torch.tensor([0.0, 0.1, 0.3, 2.0, 0.1], requires_grad=True)
        charged = penalty(original, masked, divergence)
        assert charged.shape == (5,)
        assert charged.dtype == torch.float32
        assert charged.isfinite().all()
        assert (charged >= 0).all()
        charged.sum().backward()
        assert divergence.grad is not None
        assert (divergence.grad[1:] > 0).all()

    def test_nothing_is_charged_for_equal_outputs(self, penalty: Penalty) -> None:
        assert penalty(classes(0), classes(0), torch.zeros(5)).abs().max() == 0

    def test_its_state_is_taken_over(self, name: str, penalty: Penalty) -> None:
        """A run that is resumed does not see the model's own outputs again."""
        penalty.fit(classes(0))
        twin = self.made(name)
        twin.load_state_dict(copy.deepcopy(penalty.state_dict()))
        costs = [each(classes(0), classes(1), torch.ones(5)) for each in (penalty, twin)]
        assert same_bits(*costs)

    def test_more_divergence_costs_more(self, penalty: Penalty) -> None:
        costs = [penalty(classes(0), classes(1), torch.full((5,), far)) for far in (0.0, 0.1, 1.0, 5.0)]
        assert all((less < more).all() for less, more in itertools.pairwise(costs))

    def test_outputs_without_classes_are_charged(self, penalty: Penalty) -> None:
        normal = torch.distributions.Normal(torch.zeros(5), 1.0)
        penalty.fit(normal)
        assert penalty(normal, normal, torch.ones(5)).shape == (5,)


class TestOptimizers:
    @pytest.fixture(params=registered(OPTIMIZERS))
    def name(self, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    def made(self, name: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        """Two groups with learning rates of their own, and a weight that gets no gradient."""
        weights = [
            nn.Parameter(torch.tensor([2.0, -3.0])),
            nn.Parameter(torch.tensor(1.0)),
            nn.Parameter(torch.ones(1)),
        ]
        groups = [{"params": [weights[0], weights[2]], "lr": 0.05}, {"params": [weights[1]], "lr": 0.01}]
        return weights, registry.make(OPTIMIZERS, name, {"params": groups})

    def down(self, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> float:
        """Steps on a quadratic; its value."""
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(weights).backward()
            optimizer.step()
        return self.loss(weights).item()

    def loss(self, weights: list[nn.Parameter]) -> Tensor:
        return weights[0].square().sum() + weights[1].square()

    def test_it_lowers_a_quadratic(self, name: str) -> None:
        weights, optimizer = self.made(name)
        before = self.loss(weights).item()
        assert self.down(weights, optimizer, 200) < before / 10
        assert weights[2].item() == 1.0  # no gradient, no step

    def test_groups_keep_their_learning_rates(self, name: str) -> None:
        _, optimizer = self.made(name)
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]

    def test_a_rate_of_zero_moves_nothing(self, name: str) -> None:
        """The recipe warms rates up, and lets them fall to zero."""
        weights, optimizer = self.made(name)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = [weight.detach().clone() for weight in weights]
        self.down(weights, optimizer, 5)
        assert all(torch.equal(one, other) for one, other in zip(weights, before, strict=True))

    def test_its_state_is_taken_over(self, name: str) -> None:
        """A run that was stopped goes on to the same numbers."""
        weights, optimizer = self.made(name)
        self.down(weights, optimizer, 8)
        others, twin = self.made(name)
        for weight, other in zip(weights, others, strict=True):
            other.data.copy_(weight)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.down(weights, optimizer, 8)
        self.down(others, twin, 8)
        assert all(same_bits(one.data, other.data) for one, other in zip(weights, others, strict=True))


class TestDivergences:
    NOT_A_DISTANCE = {"prediction-loss"}  # noqa: RUF012 # it is the loss against the prediction: not 0 for equal outputs

    @pytest.fixture(params=registered(DIVERGENCES))
    def name(self, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    @pytest.fixture
    def divergence(self, name: str) -> Divergence:
        return registry.make(DIVERGENCES, name)

    @pytest.fixture(params=["classes", "yes or no", "positions", "heads"])
    def outputs(self, request: pytest.FixtureRequest) -> tuple[Outputs, Outputs]:
        if request.param == "classes":
            return classes(0), classes(1)
        if request.param == "yes or no":
            return Bernoulli(logits=values((5,), 0)[:, 0]), Bernoulli(logits=values((5,), 1)[:, 0])
        if request.param == "heads":
            first, second = ({"a": classes(seed), "b": classes(seed + 5)} for seed in (0, 1))
            return first, second
        chosen = torch.arange(3) < torch.arange(1, 4)[:, None]
        first, second = (Positions(Categorical(logits=values((3, 4), seed)[:3]), chosen) for seed in (0, 1))
        return first, second

    def test_a_finite_number_for_each_example(self, divergence: Divergence, outputs: tuple[Outputs, Outputs]) -> None:
        found = divergence(*outputs)
        assert found.dim() == 1
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert (found >= 0).all()
        assert found.max() > 0

    def test_it_is_zero_for_equal_outputs(
        self, name: str, divergence: Divergence, outputs: tuple[Outputs, Outputs]
    ) -> None:
        same = divergence(outputs[0], outputs[0])
        if name in self.NOT_A_DISTANCE:
            assert (same <= divergence(*outputs) + 5).all()
        else:
            torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-6, rtol=0)

    def test_the_gradient_reaches_the_masked_outputs_alone(self, divergence: Divergence) -> None:
        logits, own = (values((4,), seed)[:5].requires_grad_() for seed in (1, 0))
        divergence(Categorical(logits=own.detach()), Categorical(logits=logits)).sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().sum() > 0

    def test_certain_outputs_stay_finite(self, divergence: Divergence) -> None:
        sure = 200 * torch.eye(4)
        assert divergence(Categorical(logits=sure), Categorical(logits=-sure)).isfinite().all()

    def test_examples_do_not_meet(self, divergence: Divergence) -> None:
        whole = divergence(classes(0), classes(1))
        for row in range(5):
            parts = (Categorical(logits=one.logits[row : row + 1]) for one in (classes(0), classes(1)))
            torch.testing.assert_close(divergence(*parts), whole[row : row + 1])


class TestRecipes:
    @pytest.fixture(params=registered(RECIPES))
    def recipe(self, request: pytest.FixtureRequest) -> Recipe:
        found = Recipe.named(request.param)
        assert found.name == request.param
        return found

    def test_it_says_what_it_is_for(self, recipe: Recipe) -> None:
        assert recipe.description

    def test_it_makes_its_parts(self, recipe: Recipe) -> None:
        assert isinstance(recipe.make_probe(), Probe)
        assert isinstance(recipe.make_objective(0.1), Objective)
        assert isinstance(recipe.make_penalty(), Penalty)
        weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        optimizer = recipe.make_optimizer([weight], [other])
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [recipe.learning_rate, recipe.baseline_learning_rate]

    def test_its_settings_make_it_again(self, recipe: Recipe) -> None:
        """As they are saved with a run."""
        assert Recipe(**dataclasses.asdict(recipe)) == recipe

    def test_its_rates_rise_and_fall(self, recipe: Recipe) -> None:
        rates = [recipe.rate(step, step / recipe.steps) for step in range(recipe.steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert max(rates) == 1


class TestMetrics:
    @pytest.fixture(params=registered(METRICS))
    def name(self, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    @pytest.fixture
    def metric(self, name: str) -> Metric:
        return registry.make(METRICS, name)

    def evidence(self, metric: Metric) -> tuple[Explanation, dict[str, Any]]:
        """An explanation of four texts, or four graphs, and all that a metric may need."""
        if type(metric).__module__.startswith("maskhooks_geometric"):
            return self.graphs()
        wrapped, inputs = small.hooked(), small.batch()
        truth = [[number % 2 for number in range(length)] for length in small.LENGTHS]
        given, *others = (
            small.explanation(wrapped, inputs, [abs(row) for row in small.scores(seed=seed)]) for seed in range(3)
        )
        explainer = LeaveOneOut(wrapped, small.SITE)
        more = {"hooked": wrapped, "batches": [inputs], "truth": truth, "others": others, "explainer": explainer}
        return given, more

    def graphs(self) -> tuple[Explanation, dict[str, Any]]:
        from torch_geometric.data import Batch

        from tests.adapters.geometric_models import Pooled, graph

        with torch.random.fork_rng():
            wrapped = wrap(Pooled().eval())
        inputs = Batch.from_data_list([graph(nodes) for nodes in (5, 6, 7, 8)])
        explainer = Random(wrapped, "first.message:output")
        return explainer.explain(inputs), {"hooked": wrapped, "batches": [inputs], "explainer": explainer}

    def test_it_says_what_it_is(self, name: str, metric: Metric) -> None:
        assert metric.name == name
        assert metric.better in ("higher", "lower")
        assert metric.range[0] < metric.range[1]
        assert isinstance(metric.unit, str)
        assert metric.source
        assert metric.needs <= {"hooked", "truth", "others", "explainer"}

    def test_a_number_in_its_range_for_each_example(self, metric: Metric) -> None:
        given, more = self.evidence(metric)
        (found,) = judge(given, metric, **more)
        assert found.values.shape == (4,)
        values = found.values[found.defined]
        assert len(values)
        assert (values >= metric.range[0]).all()
        assert (values <= metric.range[1]).all()

    def test_it_needs_only_what_it_says(self, metric: Metric) -> None:
        given, more = self.evidence(metric)
        named = {name: (name,) for name in ("truth", "others", "explainer")}
        named["hooked"] = ("hooked", "batches")
        enough = {key: more[key] for need in metric.needs for key in named[need]}
        (less,), (all_,) = judge(given, metric, **enough), judge(given, metric, **more)
        assert less.values.tolist() == pytest.approx(all_.values.tolist(), nan_ok=True)
        for need in metric.needs:
            left = {key: value for key, value in more.items() if key not in named[need]}
            with pytest.raises(SettingError, match=f"the metric '{metric.name}' needs"):
                judge(given, metric, **left)

    def test_examples_do_not_meet(self, metric: Metric) -> None:
        given, more = self.evidence(metric)
        (whole,) = judge(given, metric, **more)
        for example in range(4):
            (alone,) = judge(given.select(example=example), metric, **more)
            assert alone.examples.tolist() == [example]
            assert alone.values[0] == pytest.approx(whole.values[example], abs=1e-6, nan_ok=True)

    def test_padding_and_special_tokens_do_not_count(self, metric: Metric) -> None:
        given, more = self.evidence(metric)
        (before,) = judge(given, metric, **more)
        outside = ~given["valid"] | (given["label"] == "[CLS]")
        given["score"][outside] = np.linspace(0, 9, outside.sum())
        (after,) = judge(given, metric, **more)
        assert after.values.tolist() == pytest.approx(before.values.tolist(), nan_ok=True)

    def test_it_is_spelt_and_made_again(self, name: str, metric: Metric) -> None:
        spelt = registry.spell(METRICS, metric)
        assert spelt is not None
        assert spelt["name"] == name
        assert registry.make(METRICS, spelt).settings() == metric.settings()


def _id(value: Any) -> str:
    return str(getattr(value, "name", value))


KINDS: list[Kind[Any]] = [GATES, BASELINES, PROBES, OBJECTIVES, PENALTIES, OPTIMIZERS, METRICS]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in registered(kind)], ids=_id)
class TestSettings:
    """What makes a part: each setting has a type, and a wrong one is an error before anything is made."""

    def test_every_setting_has_a_type(self, kind: Kind[Any], name: str) -> None:
        for setting in schema_of(registry.part(kind, name)).values():
            assert setting.annotation is not Any or setting.name == "params", setting.name

    def test_a_setting_that_is_not_there(self, kind: Kind[Any], name: str) -> None:
        with pytest.raises(SettingError, match="no setting 'colour'"):
            registry.check(kind, {"name": name, "colour": 1})

    def test_a_number_as_text(self, kind: Kind[Any], name: str) -> None:
        numbers = [key for key, one in schema_of(registry.part(kind, name)).items() if one.words.startswith("a number")]
        for key in numbers:
            with pytest.raises(SettingError, match=f"{key} must be a number"):
                registry.check(kind, {"name": name, key: "much"})


def source() -> Generator:
    return Generator().manual_seed(11)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Nine positions."""
    return torch.randn(9, *shape, generator=Generator().manual_seed(seed))


def open_gates(logits: Tensor) -> GateSamples:
    """Gates with these logits, all of them counted."""
    return GateSamples(
        torch.ones_like(logits), nn.functional.logsigmoid(logits), torch.ones_like(logits, dtype=torch.bool)
    )


def classes(seed: int) -> Categorical:
    """Five examples of four classes."""
    return Categorical(logits=values((4,), seed)[:5])
