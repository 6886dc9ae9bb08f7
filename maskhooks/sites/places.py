"""Places: what is known of a site's positions in one batch."""

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
        real: which positions are no padding, over the position axes of the site's pattern.
        examples: the example of each row; None where the first axis is the batch.
        units: which positions are gated together; None where each is alone.
    """

    valid: Bool[Tensor, "*positions"]
    examples: ExampleIndex | None = None
    units: Units | None = None

    @property
    def leads(self) -> Bool[Tensor, "*positions"]:
        """The real positions that have a gate of their own: of those gated together, the first."""
        return self.valid if self.units is None else self.valid & self.units.leads.to(self.valid.device)


@runtime_checkable
class PlacesBySite(Protocol):
    """What knows the places of sites: a mapping, or what finds them out when it is asked."""

    def __getitem__(self, site: Site, /) -> Places: ...
