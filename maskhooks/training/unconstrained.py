"""Objectives without a margin: a price on what gets through, or on the noise that is not there."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.masks.bottleneck import Noised
from maskhooks.masks.samples import GateSamples
from maskhooks.settings.types import NonNegative
from maskhooks.training.objectives import Objective


class InformationBottleneck(Objective):
    """The loss of an information bottleneck: P + beta C (Schulz et al. 2020, eq. 9; Jiang et al. 2020).

    P is the penalty, such as -log p of the predicted class, and C the mean capacity of the site's valid units, both
    in nats. The multiplier is beta, and stays.

    Args:
        beta: the price of information: nats of penalty per nat of mean capacity.
    """

    def __init__(self, *, beta: NonNegative = 10.0) -> None:
        super().__init__(None)
        self.beta = beta
        self.register_buffer("multiplier", torch.tensor(float(beta)))

    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        self.multiplier = torch.full_like(closed, self.beta)

    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        if not isinstance(samples, Noised):
            raise SettingError(
                "the objective 'bottleneck' prices the capacity of noise, which gates do not have. Use it with IBA, "
                "Schulz or Readout, or another objective for masks"
            )
        loss = self._level(penalty) + self.multiplier * self._level(samples.per_example(samples.capacity))
        return loss.sum()

    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        """Leave beta as it is."""
