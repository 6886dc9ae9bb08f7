"""The tree gives the states that steps one after another give, whatever the memory and from any place on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from maskhooks.hooks.recurrence import Walk
from maskhooks.search.exact import Search, SearchResult
from maskhooks.search.scheduler import answered
from maskhooks.search.subsets import total, unrank
from maskhooks.search.tree import Tree


class Counting(Walk):
    """A recurrence whose state tells all that it read: s' = 3 s + digit, in whole numbers."""

    def __init__(self, kept: Sequence[int], closed: Sequence[int]) -> None:
        self.kept, self.closed = kept, closed
        self.first, self.length = torch.zeros(1, 1, dtype=torch.float64), len(kept)
        self.rows = 0  # computed in all

    def step(self, at: int, states: Tensor, closed: Tensor | None, kept: Tensor | None) -> None:
        self.rows += len(states)
        for out, digit in ((kept, self.kept[at]), (closed, self.closed[at])):
            if out is not None:
                out.copy_(3 * states + digit)


def read(walk: Counting, units: Sequence[Sequence[int]], kept: Tensor) -> float:
    """The final state of one set, step by step."""
    inside = {step for unit, chosen in zip(units, kept.tolist(), strict=True) if chosen for step in unit}
    state = 0
    for at in range(walk.length):
        state = 3 * state + (walk.kept[at] if at in inside or not any(at in u for u in units) else walk.closed[at])
    return float(state)


UNITS = {
    "alone": [[0], [1], [2], [3], [4], [5], [6]],
    "with steps between": [[1], [3], [4], [7], [8]],
    "of several steps": [[0, 1], [2], [4, 5, 6], [8]],
}


def walk() -> Counting:
    return Counting([2, 1, 2, 2, 1, 2, 1, 2, 2, 1], [0, 0, 1, 0, 0, 1, 0, 0, 1, 0])


@pytest.mark.parametrize("memory", [2e9, 128.0, 0.0], ids=["all", "some", "none"])
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_every_set_ends_in_its_state(units: list[list[int]], memory: float) -> None:
    steps, seen = walk(), []
    tree = Tree(
        steps, units, lambda states: seen.append(states[:, 0].clone()) or states[:, 0] > 0, rows=3, memory=memory
    )
    for size in range(len(units) + 1):
        seen.clear()
        found = torch.full((total(len(units), size),), -1.0, dtype=torch.float64)
        place = 0
        for number, block in enumerate(tree.blocks(size)):
            found[block.first : block.first + len(block.keeps)] = seen[number]
            place = block.place or place
        wanted = [read(steps, units, kept) for kept in unrank(torch.arange(len(found)), len(units), size)]
        assert found.tolist() == wanted
        assert 0 < place <= total(len(units), tree.base(size))


@pytest.mark.parametrize("memory", [2e9, 128.0])
def test_it_goes_on_from_any_place(memory: float) -> None:
    units = UNITS["alone"]
    for size in (2, 4):
        places = [
            block.place for block in Tree(walk(), units, lambda s: s[:, 0] > 0, rows=3, memory=memory).blocks(size)
        ]
        for place in filter(None, places):
            whole, fresh = (Tree(walk(), units, lambda s: s[:, 0] % 2 > 0, rows=3, memory=memory) for _ in range(2))
            started = whole.blocks(size)
            for block in started:
                if block.place == place:
                    break
            started.close()
            rest = [list(tree.blocks(size, place)) for tree in (whole, fresh)]
            assert [one.first for one in rest[0]] == [one.first for one in rest[1]]
            assert all(torch.equal(one.keeps, other.keeps) for one, other in zip(*rest, strict=True))
            after = [
                list(tree.blocks(size + 1)) for tree in (whole, fresh)
            ]  # also where the size before was left half way
            assert all(torch.equal(one.keeps, other.keeps) for one, other in zip(*after, strict=True))
            assert sum(len(block.keeps) for block in after[0]) == total(len(units), size + 1)


def test_each_state_is_computed_once() -> None:
    steps = walk()
    tree = Tree(steps, [[at] for at in range(10)], lambda states: states[:, 0] > 0)
    for size in range(11):
        for _ in tree.blocks(size):
            pass
    assert steps.rows == total(10) - 1  # a product for each state that is no leaf


def test_no_state_of_a_larger_size_is_computed_at_the_end() -> None:
    kept = []

    class Noting(Counting):
        def step(self, at: int, states: Tensor, closed: Tensor | None, kept_: Tensor | None) -> None:
            kept.append(kept_ is not None)
            super().step(at, states, closed, kept_)

    steps = Noting([1] * 6, [0] * 6)
    list(Tree(steps, [[at] for at in range(6)], lambda states: states[:, 0] > 0).blocks(0, last=lambda: True))
    assert kept
    assert not any(kept)


@pytest.mark.parametrize("memory", [2e9, 128.0, 0.0], ids=["all", "some", "none"])
def test_each_call_with_hardly_any_time_comes_further(memory: float) -> None:
    units = UNITS["alone"]
    enough = sorted(read(walk(), units, kept) for kept in unrank(torch.arange(35), 7, 4))[-2:]

    def tree() -> Tree:
        return Tree(walk(), units, lambda states: states[:, 0] >= enough[0], rows=3, memory=memory)

    def run(search: Search, **limits: Any) -> SearchResult:
        return answered(search.steps(tree(), **limits), lambda kept: torch.ones(len(kept), dtype=torch.bool))

    wanted, calls, state = run(Search(7)), 0, Search(7).state()
    while (here := Search(7)).size <= 7:
        here.restore(json.loads(json.dumps(state)))
        before = here.size, here.place
        found, calls = run(here, time_limit=1e-9), calls + 1
        state = here.state()
        if found.stopped is None:
            break
        assert (here.size, here.place) > before
    assert found.solutions == wanted.solutions
    assert wanted.solutions
    assert found.tried == wanted.tried
    assert calls > 3
