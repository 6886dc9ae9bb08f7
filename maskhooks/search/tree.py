"""Tree: subsets of positions through a recurrence, where those with a common beginning share the states of it.

For each set of k positions there is the state after its last one. From there on, closed positions lead to the end, and
at each of them a kept one begins a set of k + 1 positions: so every state is computed once, from those of a size less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from maskhooks.hooks.recurrence import Walk


class Block(NamedTuple):
    """What was found out about sets of one size that follow one another.

    Attributes:
        first: the number of the first set.
        keeps: bool, a set each, whether it leaves the prediction unchanged.
        place: where to go on when all up to here is kept; None where a place further back is to be kept.
    """

    first: int
    keeps: Tensor
    place: int | None


class Untried(NamedTuple):
    """Sets of one size that follow one another, of which nothing is known yet.

    Attributes:
        first: the number of the first set.
        sets: bool, `set position`.
        place: as with a `Block`.
    """

    first: int
    sets: Tensor
    place: int


class Tree:
    """The subsets of one example's positions, size by size.

    Args:
        walk: the steps.
        units: for each position the steps it stands at, in order; steps of two positions do not interleave.
        keeps: whether final states leave the prediction unchanged, `row state -> row`.
        length: the steps gone through; default all.
        rows: states at once.
        memory: bytes that the states of all sets of a size and of the next may take. Beyond, those of the last size
            that fits are kept, and the ones after it are computed again for each size.
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
        self._size = 0  # of the sets whose states are kept
        self._states = first
        self._next: Tensor | None = None  # those of the next size
        self._grown = 0  # for how many sets of this size they are there

    def base(self, size: int) -> int:
        """The size of the sets whose states are kept when sets of a size are tried; places depend on it."""
        return max(kept for kept in range(size + 1) if all(self._fits(one) for one in range(1, kept + 1)))

    def blocks(self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False) -> Iterator[Block]:
        """All sets of a size, from a place on; sizes do not get smaller from call to call.

        Args:
            last: asked now and then, whether no larger size will be wanted.
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
        """Goes on to the states of this size, or of the last one that fits."""
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
        """Numbers and final states of the sets of a size that begin with the kept ones from `lo` to `hi`."""
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
        """Numbers and final states of the sets of `target` positions that begin with those given.

        Args:
            states: of sets of `size` positions after the last of these; overwritten.
            number: of the first set.
            begun: the last positions of how many sets come before a position; they are the first ones.
            following: where the states of sets with one more position go.
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
        """From position `at` to the next: closed in place, kept in its own."""
        (first, _), *others = self._units[at]
        self.walk.step(first, states, states, kept)
        for step, own in others:
            self.walk.step(step, states, states if own else None, None if own else states)
            if kept is not None:
                self.walk.step(step, kept, None, kept)
