"""Joint: several maskings applied in one pass, so that all of their sites are masked at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Generator, Tensor

from maskhooks.errors import PatternError
from maskhooks.masks.gates import Gate
from maskhooks.masks.masking import Masked, Masking, Masks, Places, in_a_row
from maskhooks.sites.site import Site


class Joint(Masks):
    """All sites of some maskings masked in one pass: each reads the clean values, one divergence judges them together.

    Args:
        parts: in the order of computation.
        tied: whether all sites have the gates of the first one, so that there is one gate for an edge in all layers;
            the votes of the others are not asked.
    """

    def __init__(self, parts: Sequence[Masking], *, tied: bool = False) -> None:
        self.parts = list(parts)
        self.tied = tied
        self.depth = self.parts[-1].depth

    def __str__(self) -> str:
        return self.label

    def masked(
        self,
        values: Mapping[str, Tensor],
        places: Callable[[Site], Places],
        generator: Generator | None = None,
        *,
        rounded: float | None = None,
    ) -> list[Masked]:
        found: list[Masked] = []
        for part in self.parts:
            if found and self.tied:
                found.append(self._alike(part, found[0], values[str(part.site)], places(part.site)))
            else:
                found += part.masked(values, places, generator, rounded=rounded)
        return found

    def drawing(self, gates: Sequence[Gate]) -> Joint:
        return Joint([part.drawing([gate]) for part, gate in zip(self.parts, gates, strict=True)], tied=self.tied)

    def staged(self, progress: float) -> Joint:
        """The parts of the last depths, one more after each stage, so that masks are learned from the top down."""
        depths = sorted({part.depth for part in self.parts})
        count = len(depths) if self.tied else min(len(depths), 1 + int(len(depths) * progress))
        return Joint([part for part in self.parts if part.depth >= depths[-count]], tied=self.tied)

    def _alike(self, part: Masking, first: Masked, value: Tensor, places: Places) -> Masked:
        shape = part.site.gating().mask_shape(value, site=part.site)
        if shape != tuple(first.sample.shape):
            raise PatternError(
                f"site {part.site} has gates of shape {list(shape)}, {self.parts[0].site} those of shape "
                f"{list(first.sample.shape)}, so that they cannot be tied. Use gates for each site: tied=False",
                site=part.site,
            )
        return part.mask(value, places.real, first.sample, first.log_open, places.examples, places.units)


def together(parts: Sequence[Masked]) -> Masked:
    """What several maskings did to a batch, as one: their gates in one row, each with its example."""
    return parts[0] if len(parts) == 1 else in_a_row(*parts)
