"""Joint: several maskings applied in one pass, so that all of their sites are masked at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from maskhooks.errors import PatternError
from maskhooks.examples import Examples
from maskhooks.masking import Masked, Masking, Masks, Places
from maskhooks.site import Site


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

    def staged(self, progress: float) -> Joint:
        """The last parts, one more after each stage, so that masks are learned from the top down."""
        count = len(self.parts) if self.tied else min(len(self.parts), 1 + int(len(self.parts) * progress))
        return Joint(self.parts[len(self.parts) - count :], tied=self.tied)

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
    if len(parts) == 1:
        return parts[0]
    indices = [_index(part) for part in parts]
    count = parts[0].examples.count if parts[0].examples is not None else len(parts[0].sample)
    return Masked(
        parts[0].original,
        parts[0].replaced,
        torch.cat([part.sample.flatten() for part in parts]),
        parts[0].baseline,
        torch.cat([part.log_open.flatten() for part in parts]),
        torch.cat([part.real.flatten() for part in parts]),
        Examples(torch.cat(indices), count),
    )


def _index(masked: Masked) -> Tensor:
    """The example of each gate."""
    rows = len(masked.sample)
    own = torch.arange(rows, device=masked.sample.device) if masked.examples is None else masked.examples.index
    return own.repeat_interleave(masked.sample.numel() // max(1, rows))
