"""Exact search: find all smallest sets of positions that leave a prediction unchanged."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskhooks.progress import duration
from maskhooks.search.scheduler import SearchSteps
from maskhooks.search.subsets import total, unrank
from maskhooks.search.tree import Block, Untried


@runtime_checkable
class Strategy(Protocol):
    """How the sets of a size are tried: `Flat` or `Tree`."""

    def base(self, size: int) -> int:
        """Return what places within a size depend on."""

    def blocks(
        self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False
    ) -> Iterator[Block] | Iterator[Untried]:
        """Yield all sets of a size, from a place on; `last` says whether no larger size is needed."""


@dataclass(frozen=True)
class SearchResult:
    """The result of a search on one example.

    Attributes:
        positions: the number of valid positions.
        solutions: all smallest sets of positions that leave the prediction unchanged, in order. Empty if the search
            stopped before it found any.
        lower_bound: no set of fewer positions than this leaves the prediction unchanged; with solutions, their size.
        tried: the number of sets tried.
        seconds: how long the search took.
        stopped: the limit that ended it, `max_set_size`, `max_sets` or `time_limit`; None if it finished. If it
            finished without solutions, not even all positions satisfy the criterion.
    """

    positions: int
    solutions: tuple[tuple[int, ...], ...]
    lower_bound: int
    tried: int
    seconds: float
    stopped: str | None

    @property
    def size(self) -> int | None:
        """How many positions must be kept; None if unknown."""
        return self.lower_bound if self.solutions else None

    def __str__(self) -> str:
        if self.solutions:
            sets = ", ".join("{" + " ".join(map(str, one)) + "}" for one in self.solutions[:5])
            more = f" and {len(self.solutions) - 5} more" if len(self.solutions) > 5 else ""
            return f"{self.lower_bound} of {self.positions} positions: {sets}{more}"
        if self.stopped is None:
            return f"no set of its {self.positions} positions is enough"
        known = (
            f"no {self.lower_bound - 1} of {self.positions} positions are enough"
            if self.lower_bound
            else "nothing is known"
        )
        return f"{known} after {self.tried:,} sets in {duration(self.seconds)}; stopped by {self.stopped}"


class Search:
    """A resumable search through the sets of one example's positions, by increasing size.

    Args:
        positions: the number of positions.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.size = self.place = self.tried = 0
        self.seconds = 0.0
        self._base = 0
        self._began: tuple[float, int, int] | None = None  # when this call's first block came, and its size and place
        self._candidates: set[int] = set()  # of this size
        self._solutions: tuple[tuple[int, ...], ...] = ()

    def steps(
        self,
        strategy: Strategy,
        *,
        max_set_size: int | None = None,
        max_sets: int | None = None,
        time_limit: float | None = None,
        progress: Callable[[Search], None] = lambda search: None,
    ) -> SearchSteps[SearchResult]:
        """Search until all smallest sets are found or a limit is reached, yielding sets for the model itself to try.

        These are sets that `strategy` cannot judge, and its candidate solutions.

        Args:
            strategy: how sets are tried.
            max_set_size: the maximum size of a set.
            max_sets: the maximum number of sets tried, including those before a stop.
            time_limit: time limit of this call, from its first block of sets. Work that a stopped search repeats to get
                there does not count, and a call that may try sets always gets beyond the place where it began.
            progress: called after each block of sets.
        """
        begin = time.perf_counter()
        before = self.seconds
        self._began = stopped = None
        try:
            while not self._solutions and stopped is None:
                if self.size > self.positions:
                    break  # not even all positions satisfy the criterion
                if max_set_size is not None and self.size > max_set_size:
                    stopped = "max_set_size"
                    break
                stopped = yield from self._size(strategy, max_sets, time_limit, progress)
        finally:
            self.seconds = before + time.perf_counter() - begin
        return SearchResult(self.positions, self._solutions, self.size, self.tried, self.seconds, stopped)

    def state(self) -> dict[str, Any]:
        """Return the state of the search, JSON-serialisable."""
        return {
            "positions": self.positions,
            "size": self.size,
            "place": self.place,
            "base": self._base,
            "candidates": sorted(self._candidates),
            "solutions": [list(one) for one in self._solutions],
            "tried": self.tried,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.size, self.place, self._base = state["size"], state["place"], state["base"]
        self.tried, self.seconds = state["tried"], state["seconds"]
        self._candidates = set(state["candidates"])
        self._solutions = tuple(tuple(one) for one in state["solutions"])

    def _size(
        self,
        strategy: Strategy,
        max_sets: int | None,
        time_limit: float | None,
        progress: Callable[[Search], None],
    ) -> SearchSteps[str | None]:
        """Try the rest of a size; return the limit that stopped it, if any."""
        base = strategy.base(self.size)
        if base != self._base:  # the saved place belongs to another base
            self.place, self._base = 0, base
            self._candidates.clear()
        pending = 0
        for block in strategy.blocks(self.size, self.place, last=lambda: bool(self._candidates)):
            stopped = _limit(self.tried + pending, max_sets, self._elapsed(), time_limit)
            if stopped is not None:
                return stopped
            keeps = block.keeps if isinstance(block, Block) else (yield block.sets)
            self._candidates.update((block.first + keeps.nonzero()[:, 0]).tolist())
            pending += len(keeps)
            if block.place is not None:
                self.place, self.tried, pending = block.place, self.tried + pending, 0
            progress(self)
        yield from self._conclude()
        return None

    def _elapsed(self) -> float:
        """Return the seconds since this call's first block; 0 until the search is past the place where it began."""
        if self._began is None:
            self._began = time.perf_counter(), self.size, self.place
        since, *where = self._began
        return 0.0 if where == [self.size, self.place] else time.perf_counter() - since

    def _conclude(self) -> SearchSteps[None]:
        """Finish a size after all its sets were tried."""
        if self._candidates:
            kept = unrank(torch.tensor(sorted(self._candidates)), self.positions, self.size)
            checked = kept[(yield kept)]
            self._solutions = tuple(sorted(tuple(one.nonzero()[:, 0].tolist()) for one in checked))
            self._candidates.clear()
        if not self._solutions:
            self.size, self.place = self.size + 1, 0


def _limit(tried: int, max_sets: int | None, elapsed: float, time_limit: float | None) -> str | None:
    if max_sets is not None and tried >= max_sets:
        return "max_sets"
    return "time_limit" if time_limit is not None and elapsed >= time_limit else None


def speed(strategy: Strategy, positions: int, check: Callable[[Tensor], Tensor], seconds: float = 0.5) -> float:
    """Measure the sets tried per second, from the beginning of a search.

    Args:
        check: whether sets leave the prediction unchanged in the model itself, `set position -> set`.
    """
    begin = time.perf_counter()
    tried, half, there = 0, 0.0, 0
    for size in range(positions + 1):
        for block in strategy.blocks(size):
            tried += len(block.keeps if isinstance(block, Block) else check(block.sets))
            spent = time.perf_counter() - begin
            if spent >= seconds:
                return (tried - there) / (spent - half)
            if not half and spent >= seconds / 2:
                half, there = spent, tried
    return tried / (time.perf_counter() - begin)


def estimate_time(
    strategy: Strategy, positions: int, check: Callable[[Tensor], Tensor], seconds: float = 0.5
) -> tuple[str, int]:
    """Return how long a search would take, as text, and the largest size that it reaches within a minute."""
    rate = speed(strategy, positions, check, seconds)
    counts = list(itertools.accumulate(total(positions, size) for size in range(positions + 1)))
    top = max((size for size, count in enumerate(counts) if count / rate <= 60), default=0)
    text = (
        f"all {total(positions):,} sets take {duration(total(positions) / rate)} at {rate:,.0f} per second, "
        f"sets of up to {top} positions {duration(counts[top] / rate)}"
    )
    return text, top
