"""Every registered gate and baseline, a stranger's too, passes one list."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from maskhooks.errors import SettingError
from maskhooks.masks.baselines import BASELINES, Baseline
from maskhooks.masks.gates import GATES, Gate
from maskhooks.masks.mix import mix
from maskhooks.plugins.registry import registry
from tests.conftest import same_bits
from tests.contract.conftest import registered

pytestmark = pytest.mark.usefixtures("strangers")

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

    def test_it_is_spelt_and_made_again(self, gate: Gate) -> None:
        spelt = registry.spell(GATES, gate)
        assert spelt is not None
        again: Gate = registry.make(GATES, spelt["name"], **spelt["settings"])
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


def source() -> Generator:
    return Generator().manual_seed(11)


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Nine positions."""
    return torch.randn(9, *shape, generator=Generator().manual_seed(seed))
