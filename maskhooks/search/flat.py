"""Flat: subsets of positions one by one through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from maskhooks.search.question import Question
from maskhooks.search.subsets import total, unrank
from maskhooks.search.tree import Block


class Flat:
    """The subsets of one example's positions, size by size, stacked along the batch."""

    def __init__(self, question: Question) -> None:
        self.question = question

    def base(self, size: int) -> int:
        """See `Tree.base`."""
        return size

    def blocks(self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False) -> Iterator[Block]:
        """See `Tree.blocks`."""
        positions, rows = self.question.positions, self.question.rows
        end = total(positions, size)
        for lo in range(place, end, rows):
            numbers = torch.arange(lo, min(lo + rows, end))
            yield Block(lo, self.question.keeps(unrank(numbers, positions, size)), lo + len(numbers))
