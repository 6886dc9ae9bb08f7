"""Gates: samples, masses, log-probabilities and gradients agree with each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

from maskhooks.errors import SettingError
from maskhooks.masks.gates import Bernoulli, Gate, HardConcrete

GATES: list[Gate] = [HardConcrete(), HardConcrete.louizos(), HardConcrete(0.5, -0.4, 1.3), Bernoulli()]
LOGITS = [-4.0, -1.0, 0.0, 0.7, 3.0]
COUNT = 200_000


@pytest.fixture(params=GATES, ids=str)
def gate(request: pytest.FixtureRequest) -> Gate:
    found: Gate = request.param
    return found


@pytest.fixture(params=LOGITS)
def logit(request: pytest.FixtureRequest) -> float:
    found: float = request.param
    return found


def samples(gate: Gate, logit: float) -> torch.Tensor:
    return gate.sample(torch.full((COUNT,), logit), Generator().manual_seed(7))


def test_samples_lie_in_the_unit_interval(gate: Gate, logit: float) -> None:
    z = samples(gate, logit)
    assert z.min() >= 0
    assert z.max() <= 1
    assert z.isfinite().all()


def test_probability_of_being_open_is_that_of_the_samples(gate: Gate, logit: float) -> None:
    share = (samples(gate, logit) != 0).double().mean().item()
    p = gate.probability(torch.tensor(logit)).item()
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / COUNT) + 1e-6)
    assert gate.log_open(torch.tensor(logit)).exp().item() == pytest.approx(p)


@pytest.mark.parametrize("gate", GATES[:3], ids=str)
def test_mass_at_one(gate: HardConcrete, logit: float) -> None:
    share = (samples(gate, logit) >= 1 - 1e-6).double().mean().item()
    opened = gate.log_prob(torch.tensor(1.0), torch.tensor(logit)).exp().item()
    assert opened == pytest.approx(share, abs=5e-3)


@pytest.mark.parametrize("gate", GATES[:3], ids=str)
def test_score_function_gradient_of_hard_concrete(gate: HardConcrete) -> None:
    """d/da E[z] through log_prob, against the pathwise gradient of the same expectation."""
    pathwise, score = (torch.full((COUNT,), 0.5, requires_grad=True) for _ in range(2))
    gate.sample(pathwise, Generator().manual_seed(1)).sum().backward()
    z = gate.sample(score, Generator().manual_seed(2)).detach()
    ((z - z.mean()) * gate.log_prob(z, score)).sum().backward()
    assert pathwise.grad is not None
    assert score.grad is not None
    assert score.grad.mean().item() == pytest.approx(pathwise.grad.mean().item(), abs=5e-3)


def test_bernoulli_log_prob(logit: float) -> None:
    p = 1 / (1 + math.exp(-logit))
    closed, opened = Bernoulli().log_prob(torch.tensor([0.0, 1.0]), torch.full((2,), logit)).tolist()
    assert closed == pytest.approx(math.log(1 - p))
    assert opened == pytest.approx(math.log(p))
    assert samples(Bernoulli(), logit).unique().tolist() == [0, 1]


def test_settings_of_the_papers() -> None:
    louizos = HardConcrete.louizos()
    assert (louizos.temperature, louizos.low, louizos.high) == (2 / 3, -0.1, 1.1)
    assert HardConcrete().settings() == {"temperature": 0.2, "low": -0.2, "high": 1.0, "rounded": False}
    for logit in LOGITS:  # Louizos et al. 2018, eq. 12
        expected = 1 / (1 + math.exp(-(logit - 2 / 3 * math.log(0.1 / 1.1))))
        assert louizos.probability(torch.tensor(logit)).item() == pytest.approx(expected, rel=1e-5)
    assert HardConcrete(**louizos.settings()) == louizos


def test_the_gradient_of_a_sample(gate: Gate) -> None:
    logits = torch.linspace(-2, 2, 500).requires_grad_()
    gate.sample(logits, Generator().manual_seed(0)).sum().backward()
    assert logits.grad is not None
    assert (logits.grad >= 0).all()
    assert (logits.grad > 0).any()
    if isinstance(gate, Bernoulli):  # straight through
        p = logits.detach().sigmoid()
        torch.testing.assert_close(logits.grad, p * (1 - p))


def test_the_gradient_of_the_expected_count(gate: Gate) -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    gate.probability(logits).sum().backward()
    assert logits.grad is not None
    assert (logits.grad > 0).all()


def test_score_function_gradient_is_unbiased() -> None:
    """d/da E[z] through log_prob, against the exact derivative."""
    logits = torch.full((COUNT,), 0.3, requires_grad=True)
    z = Bernoulli().sample(logits, Generator().manual_seed(1)).detach()
    (z * Bernoulli().log_prob(z, logits)).sum().backward()
    assert logits.grad is not None
    p = 1 / (1 + math.exp(-0.3))
    assert logits.grad.mean().item() == pytest.approx(p * (1 - p), abs=5e-3)


def test_a_generator_gives_the_same_samples_and_leaves_the_global_state(gate: Gate) -> None:
    logits, state = torch.zeros(50), torch.get_rng_state()
    first = gate.sample(logits, Generator().manual_seed(3))
    assert torch.equal(first, gate.sample(logits, Generator().manual_seed(3)))
    assert not torch.equal(first, gate.sample(logits, Generator().manual_seed(4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mathematics_is_float32(gate: Gate, dtype: torch.dtype) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype)
    z = gate.sample(logits)
    assert z.dtype == torch.float32
    assert gate.log_open(logits).dtype == torch.float32
    assert gate.log_prob(z, logits).dtype == torch.float32


@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits_stay_finite(gate: Gate, logit: float) -> None:
    logits = torch.full((1000,), logit, requires_grad=True)
    z = gate.sample(logits, Generator().manual_seed(0))
    assert z.unique().tolist() == [float(logit > 0)]
    (z + gate.log_prob(z.detach(), logits) + gate.log_open(logits)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("settings", [(0.0, -0.1, 1.1), (0.2, 0.0, 1.1), (0.2, -0.1, 0.9), (math.nan, -0.1, 1.1)])
def test_settings_outside_their_range(settings: tuple[float, float, float]) -> None:
    wrong = r"temperature > 0 and low < 0 < 1 <= high, got temperature|temperature must be a number"
    with pytest.raises(SettingError, match=wrong):
        HardConcrete(*settings)


def test_rounded_samples_are_zero_or_one_with_the_gradient_of_what_was_rounded() -> None:
    gate = HardConcrete.straight_through()
    logits = torch.linspace(-3, 3, 7).repeat(20_000, 1).requires_grad_()
    sample = gate.sample(logits, torch.Generator().manual_seed(0))
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(sample.mean(0), gate.probability(logits)[0], atol=0.01)
    smooth = HardConcrete(gate.temperature).sample(logits, torch.Generator().manual_seed(0))
    (own,), (other,) = (torch.autograd.grad(z.sum(), logits) for z in (sample, smooth))
    assert torch.equal(own, other)
    assert bool(own.any())
    known = gate.log_prob(torch.tensor([0.0, 1.0]), torch.tensor([0.7, 0.7])).exp()
    assert torch.allclose(known.sum(), torch.tensor(1.0))
