"""Exact search by growing size: all smallest sets, limits, and going on after a stop."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from maskhooks.search.exact import Search, SearchResult, estimate_time, speed
from maskhooks.search.scheduler import answered
from maskhooks.search.subsets import total, unrank
from maskhooks.search.tree import Block


class Listed:
    """Sets one by one, judged by a function of each."""

    def __init__(self, positions: int, keeps: Callable[[frozenset[int]], bool], rows: int = 4) -> None:
        self.positions, self.rows, self.asked = positions, rows, list[frozenset[int]]()
        self.one = keeps

    def keeps(self, kept: Tensor) -> Tensor:
        sets = [frozenset(row.nonzero()[:, 0].tolist()) for row in kept]
        self.asked += sets
        return torch.tensor([self.one(one) for one in sets], dtype=torch.bool)

    def base(self, size: int) -> int:
        return size

    def blocks(self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False) -> Iterator[Block]:
        for lo in range(place, total(self.positions, size), self.rows):
            numbers = torch.arange(lo, min(lo + self.rows, total(self.positions, size)))
            yield Block(lo, self.keeps(unrank(numbers, self.positions, size)), lo + len(numbers))


def pairs(kept: frozenset[int]) -> bool:
    return {1, 4} <= kept or {2, 5} <= kept


def accepts(kept: Tensor) -> Tensor:
    return torch.ones(len(kept), dtype=torch.bool)


def run(search: Search, way: Listed, check: Callable[[Tensor], Tensor], **limits: Any) -> SearchResult:
    return answered(search.steps(way, **limits), check)


def test_all_smallest_sets_and_no_larger_one_is_tried() -> None:
    way = Listed(7, pairs)
    found = run(Search(7), way, way.keeps)
    assert found.solutions == ((1, 4), (2, 5))
    assert (found.size, found.lower_bound, found.stopped, found.tried) == (2, 2, None, 1 + 7 + 21)
    assert max(map(len, way.asked)) == 2
    assert str(found) == "2 of 7 positions: {1 4}, {2 5}"


@pytest.mark.parametrize("positions", [0, 3])
def test_the_empty_set_may_be_enough(positions: int) -> None:
    way = Listed(positions, lambda kept: True)
    found = run(Search(positions), way, way.keeps)
    assert (found.solutions, found.size, found.tried) == (((),), 0, 1)


def test_sets_that_the_model_itself_refuses_are_no_solutions() -> None:
    way = Listed(5, pairs)
    found = run(Search(5), way, Listed(5, lambda kept: {0, 1, 4} <= kept).keeps)
    assert found.solutions == ((0, 1, 4),)


def test_where_not_even_all_positions_are_enough() -> None:
    way = Listed(4, lambda kept: False)
    found = run(Search(4), way, way.keeps)
    assert (found.solutions, found.size, found.stopped, found.tried) == ((), None, None, 16)
    assert str(found) == "no set of its 4 positions is enough"


@pytest.mark.parametrize(
    ("limit", "below"), [({"max_set_size": 1}, 2), ({"max_sets": 9}, 2), ({"time_limit": 1e-9}, 1)]
)
def test_a_limit_leaves_what_is_known(limit: dict[str, float], below: int) -> None:
    way = Listed(7, pairs)
    found = run(Search(7), way, way.keeps, **limit)
    assert (found.solutions, found.size, found.lower_bound, found.stopped) == ((), None, below, next(iter(limit)))
    assert "stopped by" in str(found)


def test_a_stopped_search_goes_on_and_tries_nothing_twice() -> None:
    whole = Listed(7, lambda kept: len(kept) == 4 and 0 in kept)
    wanted = run(Search(7), whole, whole.keeps)
    way, state = Listed(7, whole.one), None
    for limit in itertools.count(5, 5):
        search = Search(7)
        if state is not None:
            search.restore(json.loads(state))
        found = run(search, way, accepts, max_sets=limit)
        state = json.dumps(search.state())
        if found.stopped is None:
            break
    assert found.solutions == wanted.solutions
    assert found.tried == wanted.tried
    assert limit > 30


def test_time_before_the_first_block_does_not_count() -> None:
    class Slow(Listed):
        def blocks(self, size: int, place: int = 0, *, last: Callable[[], bool] = lambda: False) -> Iterator[Block]:
            time.sleep(0.3 if not self.asked else 0.0)  # as states are computed again
            yield from super().blocks(size, place, last=last)

    way = Slow(7, pairs)
    found = run(Search(7), way, way.keeps, time_limit=0.29)
    assert (found.stopped, found.tried) == (None, 29)
    assert found.seconds >= 0.29


def test_a_search_that_raised_goes_on() -> None:
    def fails(kept: frozenset[int]) -> bool:
        if len(kept) == 2 and 5 in kept and failing:
            raise ZeroDivisionError
        return pairs(kept)

    failing, way = True, Listed(7, fails)
    search = Search(7)
    with pytest.raises(ZeroDivisionError):
        run(search, way, accepts)
    failing = False
    before = len(way.asked)
    assert run(search, way, accepts).solutions == ((1, 4), (2, 5))
    assert len(way.asked) - before < 29


def test_places_of_another_way_begin_the_size_anew() -> None:
    class Based(Listed):
        def base(self, size: int) -> int:
            return 0

    search = Search(7)
    run(search, Listed(7, pairs), accepts, max_sets=20)
    assert search.place
    assert run(search, Based(7, pairs), accepts).solutions == ((1, 4), (2, 5))


def test_how_long_it_would_take() -> None:
    rate = speed(Listed(40, lambda kept: False), 40, accepts, 0.05)
    text, top = estimate_time(Listed(40, lambda kept: False), 40, accepts, 0.05)
    assert 100 < rate < 1e8
    assert text.startswith(f"all {2**40:,} sets take ")
    assert 1 <= top < 40
