"""Hard concrete gates against the definition in float64 (Louizos et al. 2018, eq. 10 to 12)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

from maskhooks.masks.gates import HardConcrete

GATES = [HardConcrete(), HardConcrete.louizos(), HardConcrete(0.5, -0.4, 1.3)]
LOGITS = [-4.0, -1.0, 0.0, 0.7, 3.0]
COUNT = 200_000


def hard_concrete_cdf(gate: HardConcrete, logit: float, z: float) -> float:
    """P(sample <= z) for 0 < z < 1, straight from the definition (Louizos et al. 2018, eq. 10 and 11)."""
    s = (z - gate.low) / (gate.high - gate.low)
    return 1 / (1 + math.exp(-(gate.temperature * math.log(s / (1 - s)) - logit)))


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_the_samples_distribution_is_the_definitions(gate: HardConcrete, logit: float) -> None:
    z = gate.sample(torch.full((COUNT,), logit), Generator().manual_seed(7)).double()
    for at in (0.05, 0.3, 0.5, 0.9):
        p = hard_concrete_cdf(gate, logit, at)
        assert (z <= at).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(0.25 / COUNT))


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_density_integrates_with_the_masses_to_one(gate: HardConcrete, logit: float) -> None:
    """Integrated on a grid that is fine near the ends, where the density may grow without bound."""
    grid = torch.linspace(-13.8, 13.8155, 400_001, dtype=torch.float64).sigmoid()
    middle = (grid[1:] + grid[:-1]) / 2
    density = gate.log_prob(middle.float(), torch.tensor(logit).expand(len(middle))).double().exp()
    inside = (density * grid.diff()).sum().item()
    closed, opened = gate.log_prob(torch.tensor([0.0, 1.0]), torch.full((2,), logit)).double().exp().tolist()
    assert inside + closed + opened == pytest.approx(1, abs=3e-3)  # float32 near 1
    assert closed == pytest.approx(1 - gate.probability(torch.tensor(logit)).item(), abs=1e-5)


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_density_is_the_derivative_of_the_distribution(gate: HardConcrete, logit: float) -> None:
    for z in (0.02, 0.4, 0.97):
        slope = (hard_concrete_cdf(gate, logit, z + 1e-6) - hard_concrete_cdf(gate, logit, z - 1e-6)) / 2e-6
        density = gate.log_prob(torch.tensor(z), torch.tensor(logit)).exp().item()
        assert density == pytest.approx(slope, rel=2e-3)
