"""Objectives without a margin: a price on what gets through, or on the noise that is not there."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.masks.samples import GateSamples
from maskhooks.training.objectives import Objective


class InformationBottleneck(Objective):
    """The loss of an information bottleneck: P + beta C (Schulz et al. 2020, eq. 9; Jiang et al. 2020).

    P is the penalty, such as -log p of the predicted class, and C the mean capacity of the site's valid units, both
    in nats. The multiplier is beta, and stays.

    Args:
        beta: the price of information: nats of penalty per nat of mean capacity.
    """

    def __init__(self, beta: float) -> None:
        super().__init__(None)
        self.beta = beta
        self.register_buffer("multiplier", torch.tensor(float(beta)))

    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        self.multiplier = torch.full_like(closed, self.beta)

    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        assert samples.nats is not None
        loss = self._level(penalty) + self.multiplier * self._level(samples.per_example(samples.nats))
        return loss.sum()

    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        """Leave beta as it is."""


class NoiseEntropy(Objective):
    """The loss of Guan et al. 2019 as De Cao et al. 2020 use it: P - weight sum H, over the site's valid positions.

    P is the penalty, such as the squared difference of outputs, and H the entropy of a position's noise in nats.

    Args:
        weight: what a nat of noise is worth.
    """

    def __init__(self, weight: float) -> None:
        super().__init__(None)
        self.weight = weight
        self.register_buffer("multiplier", torch.tensor(float(weight)))

    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        self.multiplier = torch.full_like(closed, self.weight)

    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        assert samples.nats is not None
        loss = self._level(penalty) - self.multiplier * self._level(samples.total(samples.nats))
        return loss.sum()

    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        """Leave the weight as it is."""
