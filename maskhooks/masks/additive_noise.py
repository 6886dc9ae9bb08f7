"""Additive noise: Gaussian noise of a learned deviation on each position of a site's value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from maskhooks.hooks.tap import Values
from maskhooks.masks.baselines import Zero
from maskhooks.masks.bottleneck import Soft
from maskhooks.masks.masking import Masking
from maskhooks.masks.samples import Masked
from maskhooks.masks.votes import Vote
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site


class AdditiveNoise(Masking):
    """Adds noise to a site's value: h + s e with e ~ N(0, 1) for each feature, and s = softplus(logits) per position.

    `nats` of its samples is the entropy of a position's noise, ln(2 pi e s^2) / 2.

    Args:
        site, depth, votes: as for `Masking`.

    Raises:
        PatternError: the site has no pattern.
    """

    def __init__(self, site: Site, depth: int, votes: Sequence[Vote]) -> None:
        super().__init__(site, depth, votes, Soft(), Zero())

    @property
    def noisy(self) -> bool:
        return True

    def deviation(self, values: Values, places: Places) -> Float[Tensor, "*gated"]:
        """Return the standard deviation of each position's noise, in the units of the site's value."""
        return F.softplus(self.logits(values, places.units)[0])

    def sample(
        self, values: Values, places: Places, generator: Generator | None = None, *, rounded: float | None = None
    ) -> Masked:
        """Add noise to a batch; see `Masking.sample`.

        Args:
            rounded: not used: noise is not rounded.
        """
        deviation = self.deviation(values, places)
        masked = self.mask(values[self.site], places, torch.zeros_like(deviation), -deviation)
        shared = deviation if places.units is None else places.units.shared(deviation, self.pattern)
        value = masked.original
        noise = self.pattern.spread(shared, value) * self.normal(value, places, generator)
        entropy = 0.5 * math.log(2 * math.pi * math.e) + deviation.log()
        return dataclasses.replace(masked, baseline=value + noise.to(value.dtype), nats=entropy)
