"""Votes: a probe with the sites it reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from maskhooks.hooks.tap import Values
from maskhooks.masks.probes import Picked, Probe
from maskhooks.sites.site import Site


@dataclass(frozen=True)
class Vote:
    """One probe and the sites it reads; none for per-example logits.

    Values at sites tagged "picked" are rows of their module's first input, selected by the indices in its second.
    These two inputs are read instead, so a probe can compute once per state what many rows share.
    """

    reads: tuple[Site, ...]
    probe: Probe

    @property
    def sites(self) -> list[Site]:
        """The sites to read from the model."""
        return [part for site in self.reads for part in (_origin(site) if "picked" in site.tags else (site,))]

    def values(self, values: Values) -> list[Shaped[Tensor, "..."] | Picked]:
        """Return the probe's inputs from the values at `sites`."""
        return [self._value(site, values) for site in self.reads]

    def _value(self, site: Site, values: Values) -> Shaped[Tensor, "*positions features"] | Picked:
        pattern = site.gating()
        if "picked" in site.tags and self.probe.picks and pattern.in_rows:
            return Picked(*(values[part] for part in _origin(site)))
        return pattern.rows(value_at(site, values), site=site)


@functools.lru_cache(maxsize=1024)  # called in every pass
def _origin(site: Site) -> tuple[Site, Site]:
    states, numbers = (Site(site.module, "input", (place,), site.call) for place in (0, 1))
    return states, numbers


def value_at(site: Site, values: Values) -> Shaped[Tensor, "..."]:
    """Return the value at a site that a vote reads, from the values at `Vote.sites`."""
    if "picked" not in site.tags or str(site) in values:
        return values[site]
    return Picked(*(values[part] for part in _origin(site))).rows
