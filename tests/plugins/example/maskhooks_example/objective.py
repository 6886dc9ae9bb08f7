"""An objective whose multiplier moves by exponentiated gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from maskhooks.masks.samples import GateSamples
from maskhooks.settings.types import Positive
from maskhooks.training.objectives import Objective


class ExponentiatedGradient(Objective):
    """S + multiplier (P / m - 1), and after a step multiplier <- multiplier exp(rate (D / m - 1)), up to a highest one.

    S is the fraction kept, P the penalty, D the divergence, and m the margin. The multiplier is never negative, and
    rises fast where the divergence is far beyond the margin (Kivinen and Warmuth 1997).

    Args:
        margin: m, in nats.
        rate: speed of the multiplier.
        initial: its start.
        highest: its most.
    """

    def __init__(
        self, margin: Positive, *, rate: Positive = 0.02, initial: Positive = 1.0, highest: Positive = 100.0
    ) -> None:
        super().__init__(margin)
        self.rate, self.initial, self.highest = rate, initial, highest
        self.register_buffer("multiplier", torch.tensor(initial))

    def start(self, closed: Tensor) -> None:
        self.multiplier = torch.full_like(closed.float(), self.initial)  # one, or one for each example

    def forward(self, samples: GateSamples, divergence: Tensor, penalty: Tensor) -> Tensor:
        over = self._level(penalty) / self.margin - 1
        return (self._level(samples.expected_l0) + self.multiplier * over).sum()

    def ascend(self, divergence: Tensor) -> None:
        over = self._level(divergence.detach()) / self.margin - 1
        self.multiplier = (self.multiplier * (self.rate * over).exp()).clamp(max=self.highest)
