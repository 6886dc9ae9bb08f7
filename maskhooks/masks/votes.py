"""Votes: a probe, the sites it reads, and what is read of the model for them."""

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
    """One probe and the sites it reads; empty for free logits.

    Values at sites tagged "picked" are rows of their module's first input, by the numbers in its second. These two are
    read in their place, so that a probe may compute once for each state what is many rows.
    """

    reads: tuple[Site, ...]
    probe: Probe

    @property
    def sites(self) -> list[Site]:
        """What is read of the model."""
        return [part for site in self.reads for part in (_origin(site) if "picked" in site.tags else (site,))]

    def values(self, values: Values) -> list[Shaped[Tensor, "..."] | Picked]:
        """What the probe is given, of the values at `sites`."""
        return [self._value(site, values) for site in self.reads]

    def _value(self, site: Site, values: Values) -> Shaped[Tensor, "*positions features"] | Picked:
        pattern = site.gating()
        if "picked" in site.tags and self.probe.picks and pattern.in_rows:
            return Picked(*(values[part] for part in _origin(site)))
        return pattern.rows(value_at(site, values), site=site)


@functools.lru_cache(maxsize=1024)  # asked in every pass
def _origin(site: Site) -> tuple[Site, Site]:
    states, numbers = (Site(site.module, "input", (place,), site.call) for place in (0, 1))
    return states, numbers


def value_at(site: Site, values: Values) -> Shaped[Tensor, "..."]:
    """The value at a site that a vote reads, of the values at `Vote.sites`."""
    if "picked" not in site.tags or str(site) in values:
        return values[site]
    return Picked(*(values[part] for part in _origin(site))).rows
