"""Information bottlenecks: a site's value is mixed with noise, and the mixture limits how much of it gets through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from maskhooks.errors import PatternError
from maskhooks.hooks.tap import Values
from maskhooks.masks.baselines import Noise
from maskhooks.masks.gates import Gate
from maskhooks.masks.masking import Masking
from maskhooks.masks.samples import Masked
from maskhooks.masks.votes import Vote
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site

_MOST = 1 - 1e-6  # of z, where its logarithm and gradient are finite
_NARROW = math.sqrt(1e-5)  # the deviation of statistics of a single item there
_LOWEST = -10.0  # log-variance, as in the code of Jiang et al. 2020: more information than that is not counted


def gaussian_kl(mean: Float[Tensor, "*any"], log_variance: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)), elementwise, in nats."""
    return 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance)


class Soft(Gate):
    """z = sigmoid(a), without noise of its own: the share of the value in a mixture. `log_open` is log z."""

    def sample(self, logits: Float[Tensor, "*any"], generator: Generator | None = None) -> Float[Tensor, "*any"]:
        return torch.sigmoid(logits.float())

    def log_open(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return F.logsigmoid(logits.float())

    def log_prob(self, sample: Float[Tensor, "*any"], logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return torch.zeros_like(sample)

    def settings(self) -> dict[str, Any]:
        return {}


class Bottleneck(Masking):
    """An information bottleneck at one site: z h + (1 - z) e with e ~ N(mean, deviation^2) (Schulz et al. 2020).

    `nats` of its samples is the capacity of each gate, the mean over its features of
    KL(N(z r, (1 - z)^2) || N(0, 1)) with r = (h - mean) / deviation (eq. 6): an upper bound of the mutual information
    of the value and the mixture.

    Args:
        site, depth, votes: as for `Masking`; z is the sigmoid of the vote's logits.
        noise: what replaces information; its mean and deviation are those of the data.
        per_feature: whether each feature has a gate of its own, instead of each position.
        smoothing: standard deviation, in positions, of a Gaussian blur of z over the last two position axes, such as
            rows and columns; 0 for none.
        previous: a site whose value is the noise's mean, with a deviation of sqrt(1e-5), instead of statistics.

    Raises:
        PatternError: the site has no pattern, or too few position axes for smoothing.
    """

    baseline: Noise

    def __init__(
        self,
        site: Site,
        depth: int,
        votes: Sequence[Vote],
        noise: Noise,
        *,
        per_feature: bool = True,
        smoothing: float = 0.0,
        previous: Site | None = None,
    ) -> None:
        super().__init__(site, depth, votes, Soft(), noise)
        self.per_feature, self.smoothing, self.previous = per_feature, smoothing, previous
        if smoothing and len(self.pattern.positions) != 3:
            raise PatternError(
                f"smoothing needs two position axes beside the batch, such as rows and columns, but site {site} has "
                f"({', '.join(self.pattern.positions)}). Leave it out",
                site=site,
            )

    @property
    def reads(self) -> list[Site]:
        more = [] if self.previous is None else [self.previous]
        return list(dict.fromkeys([*super().reads, *more]))

    def sizes_for(self, values: Values) -> dict[str, Any]:
        if self.per_feature:
            self.pattern = self.site.gating().per_feature(values[self.site], site=self.site)
        return {**super().sizes_for(values), "pattern": str(self.pattern)}

    def start(self, sizes: Mapping[str, Any], device: torch.device) -> None:
        self.pattern = Pattern.parse(sizes["pattern"])
        super().start(sizes, device)

    def sample(
        self, values: Values, places: Places, generator: Generator | None = None, *, rounded: float | None = None
    ) -> Masked:
        """Mix a batch with noise; see `Masking.sample`.

        Args:
            rounded: give each gate above this the value alone, and the others noise alone.
        """
        logits = self.logits(values, places.units)[0]
        z = self._smoothed(self.gate.sample(logits))
        shown = z if rounded is None else (z > rounded).float()
        masked = self.mask(values[self.site], places, shown, z.log())
        value = masked.original
        mean, deviation = self._noise(values)
        noise = mean + deviation * self.normal(value, places, generator)
        capacity = self._capacity(masked.sample, (value.float() - mean) / deviation)
        return dataclasses.replace(masked, baseline=noise, nats=capacity)

    def _capacity(
        self, sample: Float[Tensor, "*gates"], standardised: Float[Tensor, "*value"]
    ) -> Float[Tensor, "*gates"]:
        """Return the capacity of each gate, in nats; ln (1 - z)^2 counts as -10 at least."""
        pattern = self.pattern
        z = pattern.spread(sample, standardised).expand_as(standardised)
        log_variance = (2 * torch.log1p(-z.clamp(max=_MOST))).clamp(min=_LOWEST)
        found = gaussian_kl(z * standardised, log_variance)
        sizes = pattern.shape(standardised)
        left = pattern.arrow.split("->")[0]
        split = {axis: size for axis, size in sizes.items() if axis in pattern.sizes}
        capacity: Tensor = einops.reduce(found, f"{left} -> {' '.join(pattern.gated)}", "mean", **split)
        return capacity

    def _noise(self, values: Values) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Return the noise's mean and deviation, each broadcastable against the site's value."""
        if self.previous is not None:
            mean = values[self.previous].float()
            return mean, mean.new_tensor(_NARROW)
        value = values[self.site]
        statistics = (self.baseline(), self.baseline.deviation)
        mean, deviation = (self.pattern.spread_features(one, value) for one in statistics)
        return mean, deviation

    def _smoothed(self, z: Float[Tensor, "*gated"]) -> Float[Tensor, "*gated"]:
        """Blur z over the last two position axes, each feature by itself, mirrored at the edges."""
        if not self.smoothing:
            return z
        axes = self.pattern.gated
        sizes = dict(zip(axes, z.shape, strict=True))
        for axis in self.pattern.positions[1:]:
            blurred = [f"blurred_{axis}" if one == axis else one for one in axes]
            arrow = f"{' '.join(axes)}, blurred_{axis} {axis} -> {' '.join(blurred)}"
            z = einops.einsum(z, _blur(sizes[axis], self.smoothing, z.device), arrow)
        return z


def _blur(size: int, deviation: float, device: torch.device) -> Float[Tensor, "size size"]:
    """The matrix of a Gaussian blur over `size` positions in a row; beyond the ends stand their mirror images."""
    reach = round(2 * deviation)
    offsets = torch.arange(-reach, reach + 1, device=device)
    weights = torch.exp(-0.5 * (offsets / deviation) ** 2)
    period = max(2 * (size - 1), 1)  # of mirror images of mirror images
    places = (torch.arange(size, device=device)[:, None] + offsets) % period
    mirrored = F.one_hot(torch.minimum(places, period - places), size)
    return einops.einsum(weights / weights.sum(), mirrored.float(), "offset, to offset at -> to at")
