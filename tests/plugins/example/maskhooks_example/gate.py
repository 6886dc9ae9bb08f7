"""A gate with Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.special import log_ndtr

from maskhooks.masks.gates import Gate
from maskhooks.settings.schema import check_fields
from maskhooks.settings.types import Positive


@dataclass(frozen=True)
class Gaussian(Gate):
    """z = clip((a + deviation e + 1) / 2, 0, 1) with normal noise e (after Yamada et al. 2020, stochastic gates).

    P(z != 0) = Phi((a + 1) / deviation), where Phi is the normal distribution function.

    Args:
        deviation: standard deviation of the noise, in units of the logit a.
    """

    deviation: Positive = 1.5

    def __post_init__(self) -> None:
        check_fields(self)

    def tempered(self, factor: float) -> Gaussian:
        return replace(self, deviation=factor * self.deviation)

    def sample(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        device = logits.device if generator is None else generator.device
        noise = torch.randn(logits.shape, generator=generator, device=device).to(logits.device)
        return ((logits.float() + self.deviation * noise + 1) / 2).clamp(0, 1)

    def log_open(self, logits: Tensor) -> Tensor:
        return log_ndtr((logits.float() + 1) / self.deviation)

    def log_prob(self, sample: Tensor, logits: Tensor) -> Tensor:
        logits, sample = logits.float(), sample.float()
        closed = log_ndtr(-(logits + 1) / self.deviation)
        opened = log_ndtr((logits - 1) / self.deviation)
        noise = (2 * sample - 1 - logits) / self.deviation
        density = -(noise**2) / 2 - math.log(self.deviation * math.sqrt(2 * math.pi) / 2)
        return torch.where(sample <= 0, closed, torch.where(sample >= 1, opened, density))
