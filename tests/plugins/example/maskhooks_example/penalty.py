"""A penalty that charges far outputs for more than their distance."""

from __future__ import annotations

from torch import Tensor

from maskhooks.model.outputs import Outputs
from maskhooks.settings.types import NonNegative
from maskhooks.training.penalty import Penalty


class Squared(Penalty):
    """D + weight D^2 per example, so that one output far away costs more than several nearby.

    Args:
        weight: what the square counts, for each nat.
    """

    def __init__(self, *, weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, original: Outputs, masked: Outputs, divergence: Tensor) -> Tensor:
        return divergence + self.weight * divergence**2
