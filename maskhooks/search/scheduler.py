"""Scheduler: answer the searches of several examples together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Yields sets, `set position`, at least one; is sent a row per set; returns its result.
SearchSteps = Generator[Tensor, Tensor, T]


def answered(steps: SearchSteps[T], answer: Callable[[Tensor], Tensor]) -> T:
    """Run a search to its end and return its result.

    Args:
        answer: returns a row per set.
    """
    with contextlib.closing(steps):
        try:
            sets = next(steps)
            while True:
                sets = steps.send(answer(sets))
        except StopIteration as done:
            found: T = done.value
            return found


def run_together(
    searches: Sequence[SearchSteps[T]], answer: Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]
) -> list[T]:
    """Run several searches together and return their results; each asks again once its sets are all answered.

    Args:
        answer: takes the open sets of each search by its index, and returns the rows of the first one or more of them.
    """
    found: dict[int, T] = {}
    sets: dict[int, Tensor] = {}
    rows: dict[int, list[Tensor]] = {}

    def ask(number: int) -> None:
        try:
            given = torch.cat(rows.pop(number)) if number in rows else None
            sets[number] = searches[number].send(given)  # type: ignore[arg-type] # None starts a generator
            rows[number] = []
        except StopIteration as done:
            found[number] = done.value
            sets.pop(number, None)

    with contextlib.ExitStack() as stack:
        for number, steps in enumerate(searches):
            stack.enter_context(contextlib.closing(steps))
            ask(number)
        while sets:
            for number, part in answer(sets).items():
                rows[number].append(part)
                sets[number] = sets[number][len(part) :]
                if not len(sets[number]):
                    ask(number)
    return [found[number] for number in range(len(searches))]
