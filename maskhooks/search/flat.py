"""Flat: run subsets of positions one by one through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from maskhooks.search.subsets import total, unrank
from maskhooks.search.tree import Untried


class Flat:
    """The subsets of one example's positions, size by size.

    Args:
        positions: the number of positions.
        rows: sets tried at once.
    """

    def __init__(self, positions: int, rows: int) -> None:
        self.positions, self.rows = positions, rows

    def base(self, size: int) -> int:
        """See `Tree.base`."""
        return size

    def blocks(self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False) -> Iterator[Untried]:
        """See `Tree.blocks`; the model has yet to try these sets."""
        end = total(self.positions, size)
        for lo in range(place, end, self.rows):
            numbers = torch.arange(lo, min(lo + self.rows, end))
            yield Untried(lo, unrank(numbers, self.positions, size), lo + len(numbers))
