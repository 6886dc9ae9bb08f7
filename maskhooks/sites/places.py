"""Places: a site's positions in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.site import Site
from maskhooks.sites.units import Units


@dataclass(frozen=True)
class Places:
    """The positions of a site in a batch.

    Attributes:
        valid: which positions are not padding, over the position axes of the site's pattern.
        example_index: the example index of each row; None if the first axis is the batch axis.
        units: which positions are gated together; None if each has its own gate.
    """

    valid: Bool[Tensor, "*positions"]
    example_index: ExampleIndex | None = None
    units: Units | None = None

    @property
    def unit_heads(self) -> Bool[Tensor, "*positions"]:
        """The valid positions that carry a gate: of those gated together, only the first."""
        return self.valid if self.units is None else self.valid & self.units.unit_heads.to(self.valid.device)


@runtime_checkable
class PlacesBySite(Protocol):
    """An object that knows the places of sites: a mapping, or one that computes them on request."""

    def __getitem__(self, site: Site, /) -> Places: ...
