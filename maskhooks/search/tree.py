"""Tree: run subsets of positions through a recurrence; subsets with a common prefix share its states.

The tree keeps the state of each set of k positions after its last one. Closing all later positions leads to the final
state; keeping one of them begins a set of k + 1 positions. So each state is computed once, from those one size smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from maskhooks.hooks.recurrence import Walk


class Block(NamedTuple):
    """Results for consecutive sets of one size.

    Attributes:
        first: the rank of the first set.
        keeps: bool `(set,)`, whether each leaves the prediction unchanged.
        place: where to resume after this block; None if the search can only resume from an earlier place.
    """

    first: int
    keeps: Tensor
    place: int | None


class Untried(NamedTuple):
    """Consecutive sets of one size, not tried yet.

    Attributes:
        first: the rank of the first set.
        sets: bool, `set position`.
        place: as in `Block`.
    """

    first: int
    sets: Tensor
    place: int


class Tree:
    """The subsets of one example's positions, size by size.

    Args:
        walk: the steps.
        units: the steps of each position, in order; steps of two positions do not interleave.
        keeps: whether final states leave the prediction unchanged, `row state -> row`.
        length: the number of steps to run; default all.
        rows: states at once.
        memory: maximum bytes for the states of all sets of one size and the next. Beyond that, the states of the last
            size that fits are kept, and later ones are computed again for each size.
    """

    def __init__(
        self,
        walk: Walk,
        units: Sequence[Sequence[int]],
        keeps: Callable[[Tensor], Tensor],
        *,
        length: int | None = None,
        rows: int = 4096,
        memory: float = 2e9,
    ) -> None:
        self.walk, self.keeps, self.rows = walk, keeps, rows
        self.positions = len(units)
        length = walk.length if length is None else length
        ends = [*(unit[0] for unit in units[1:]), length]
        self._units = [[(at, at in unit) for at in range(unit[0], end)] for unit, end in zip(units, ends, strict=True)]
        first = walk.first.clone()
        for at in range(units[0][0] if units else length):
            walk.step(at, first, None, first)
        self._room = memory / (first.shape[1] * first.element_size())
        self._size = 0  # size of the sets whose states are kept
        self._states = first
        self._next: Tensor | None = None  # states of the next size
        self._grown = 0  # how many sets of this size have theirs in `_next`

    def base(self, size: int) -> int:
        """Return the size of the sets whose states are kept while sets of `size` are tried; places depend on it."""
        return max(kept for kept in range(size + 1) if all(self._fits(one) for one in range(1, kept + 1)))

    def blocks(self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False) -> Iterator[Block]:
        """Yield all sets of a size, from a place on; sizes must not decrease from call to call.

        Args:
            last: called now and then: whether no larger size is needed.
        """
        self._grow_to(size)
        grows = self._size == size and self._fits(size + 1)
        for lo in range(0, len(self._states), self.rows):
            hi = min(lo + self.rows, len(self._states))
            growing = grows and self._grown <= lo and not last()
            if hi > place:
                following = None
                for number, states in self._chunk(lo, hi, size, growing):
                    if following is not None:
                        yield following._replace(place=None)
                    following = Block(number, self.keeps(states), hi)
                if following is not None:
                    yield following
            elif growing:
                self._drain(lo, hi)

    def _fits(self, size: int) -> bool:
        return size <= self.positions and comb(self.positions, size - 1) + comb(self.positions, size) <= self._room

    def _grow_to(self, size: int) -> None:
        """Advance to the states of this size, or of the last one that fits."""
        while self._size < size and self._fits(self._size + 1):
            for lo in range(0, len(self._states), self.rows):
                if self._grown <= lo:
                    self._drain(lo, min(lo + self.rows, len(self._states)))
            assert self._next is not None
            self._states, self._next, self._grown, self._size = self._next, None, 0, self._size + 1

    def _drain(self, lo: int, hi: int) -> None:
        for _ in self._chunk(lo, hi, self._size, growing=True):
            pass

    def _chunk(self, lo: int, hi: int, target: int, growing: bool) -> Iterator[tuple[int, Tensor]]:
        """Yield the first rank and final states of the sets of a size that begin with the kept sets `lo` to `hi`."""
        if growing and self._next is None:
            shape = comb(self.positions, self._size + 1), self._states.shape[1]
            self._next = self._states.new_empty(shape)
        states, size = self._states[lo:hi].clone(), self._size

        def begun(at: int) -> int:
            return min(max(comb(at, size) - lo, 0), hi - lo)

        yield from self._visit(states, lo, size, begun, target, self._next if growing else None)
        self._grown = hi if growing else self._grown

    def _visit(
        self,
        states: Tensor,
        number: int,
        size: int,
        begun: Callable[[int], int],
        target: int,
        following: Tensor | None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the first rank and final states of the sets of `target` positions that begin with the given sets.

        Args:
            states: states of sets of `size` positions, each after its last position; overwritten.
            number: the rank of the first set.
            begun: how many sets have their last position before a given position; these come first.
            following: where to write the states of sets with one more position.
        """
        for at in range(size, self.positions - max(target - size - 1, 0)):
            count = begun(at)
            if not count:
                continue
            new, kept = comb(at, size + 1) + number, None
            if size < target:
                kept = torch.empty_like(states[:count])
            elif following is not None:
                kept = following[new : new + count]
            self._advance(at, states[:count], kept)
            if size < target and kept is not None:
                there = lambda later, at=at, count=count: count if later > at else 0  # noqa: E731
                yield from self._visit(kept, new, size + 1, there, target, None)
        if size == target:
            yield number, states

    def _advance(self, at: int, states: Tensor, kept: Tensor | None) -> None:
        """Step from position `at` to the next: closed in place, kept into `kept`."""
        (first, _), *others = self._units[at]
        self.walk.step(first, states, states, kept)
        for step, own in others:
            self.walk.step(step, states, states if own else None, None if own else states)
            if kept is not None:
                self.walk.step(step, kept, None, kept)
