"""Replacements that gate a site's value, whether it arrives whole, step by step or in portions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from maskhooks.errors import ReplacementError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.time_steps import Stepwise
from maskhooks.masks.mix import mix
from maskhooks.sites.site import Site


class _ByStep(NamedTuple):
    """What `mix` needs at each step of a sequence, without gradients."""

    sample: Sequence[Tensor]
    rest: Sequence[Tensor]  # the baseline's share; an open gate adds -0.0, which changes no number
    closed: Sequence[Tensor | None]  # None if no gate is closed
    baseline: Sequence[Tensor]


class Gated(Stepwise):
    """A replacement that mixes the value arriving at a site with a baseline, z h + (1 - z) b.

    Args:
        site: the masked site.
        sample: z, broadcastable to the value's shape; float32.
        baseline: b, broadcastable to the value's shape, in the value's dtype; the same for all rows and steps, or one
            for each.
    """

    def __init__(self, site: Site, sample: Float[Tensor, "..."], baseline: Shaped[Tensor, "..."]) -> None:
        self._site, self._sample, self._baseline = site, sample, baseline

    def __call__(self, value: Shaped[Tensor, "*value"]) -> Shaped[Tensor, "*value"]:
        return self._mixed(value, self._sample, self._baseline)

    def at(self, step: int) -> Replacement:
        sample, baseline = self._sample[:, step : step + 1], _part(self._baseline, 1, step, step + 1)
        return lambda state: mix(state, sample, baseline)

    def on(self, step: int, state: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch hidden"]:
        samples, rests, closed, baselines = self._by_step
        mixed, shut = torch.addcmul(rests[step], state, samples[step]), closed[step]
        return mixed if shut is None else torch.where(shut, baselines[step], mixed)

    def rows(self, begin: int, end: int) -> Replacement:
        sample, baseline = self._sample[begin:end], _part(self._baseline, 0, begin, end)
        return lambda part: self._mixed(part, sample, baseline)

    def _mixed(self, value: Tensor, sample: Tensor, baseline: Tensor) -> Tensor:
        sizes = list(zip(value.shape, sample.shape, strict=True))
        if any(gates not in (1, size) for size, gates in sizes):
            raise ReplacementError(
                f"site {self._site}: its value has shape {list(value.shape)} in the masked pass, but its gates have "
                f"shape {list(sample.shape)}. The model chooses positions by computed values, as pooling layers do, or "
                "draws edges at random. Mask only sites before that choice, mask this site alone, or switch the "
                "random drawing off",
                site=self._site,
            )
        return mix(value, sample, baseline)

    @functools.cached_property
    def _by_step(self) -> _ByStep:
        sample, closed = self._sample.to(self._baseline.dtype), self._sample == 0
        rest = torch.where(sample == 1, -0.0, (1 - sample) * self._baseline)
        some = closed.flatten(2).any(2).any(0).tolist()
        shut = [part if there else None for part, there in zip(closed.unbind(1), some, strict=True)]
        baselines = self._baseline.expand(-1, sample.shape[1], -1).unbind(1)
        return _ByStep(sample.unbind(1), rest.unbind(1), shut, baselines)


def _part(tensor: Tensor, axis: int, begin: int, end: int) -> Tensor:
    """Return a part along an axis; the whole where it is the same along that axis."""
    return tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, begin, end - begin)
