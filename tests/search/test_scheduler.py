"""Searches alone and together are answered the same, and closed whatever happens."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from maskhooks.search.scheduler import SearchSteps, answered, run_together


def counts(rounds: int, closed: list[int]) -> SearchSteps[list[int]]:
    """Asks about one set, then two, ...; finds how many positions each has."""
    found: list[int] = []
    try:
        for sets in range(1, rounds + 1):
            found += (yield torch.tril(torch.ones(sets, 5, dtype=torch.bool))).tolist()
    finally:
        closed.append(rounds)
    return found


@pytest.mark.parametrize("most", [1, 2, 9])
def test_abreast_as_alone(most: int) -> None:
    closed: list[int] = []
    wanted = [answered(counts(rounds, closed), lambda sets: sets.sum(1)) for rounds in (3, 0, 1)]
    calls = 0

    def answer(sets: Mapping[int, Tensor]) -> dict[int, Tensor]:
        nonlocal calls
        calls += 1
        return {number: part[:most].sum(1) for number, part in sets.items()}

    assert run_together([counts(rounds, closed) for rounds in (3, 0, 1)], answer) == wanted
    assert wanted == [[1, 1, 2, 1, 2, 3], [], [1]]
    assert calls == {1: 6, 2: 4, 9: 3}[most]
    assert len(closed) == 6


def test_all_are_closed_where_an_answer_fails() -> None:
    closed: list[int] = []

    def fails(sets: object) -> dict[int, Tensor]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_together([counts(2, closed), counts(3, closed)], fails)
    with pytest.raises(ZeroDivisionError):
        answered(counts(4, closed), fails)  # type: ignore[arg-type]
    assert sorted(closed) == [2, 3, 4]
