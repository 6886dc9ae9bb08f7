"""Scheduler: searches ask about sets of positions; those of several examples are answered together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Yields sets, `set position`, at least one; is sent a row for each; returns what it has found out.
Asking = Generator[Tensor, Tensor, T]


def answered(asking: Asking[T], answer: Callable[[Tensor], Tensor]) -> T:
    """What an asking finds out.

    Args:
        answer: a row for each set.
    """
    with contextlib.closing(asking):
        try:
            sets = next(asking)
            while True:
                sets = asking.send(answer(sets))
        except StopIteration as done:
            found: T = done.value
            return found


def abreast(askings: Sequence[Asking[T]], answer: Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]) -> list[T]:
    """What several find out that are answered together; one that has all its answers asks on at once.

    Args:
        answer: given the sets that are left of each one's, by its number, the rows for the first or more of them.
    """
    found: dict[int, T] = {}
    sets: dict[int, Tensor] = {}
    rows: dict[int, list[Tensor]] = {}

    def ask(number: int) -> None:
        try:
            given = torch.cat(rows.pop(number)) if number in rows else None
            sets[number] = askings[number].send(given)  # type: ignore[arg-type] # as next() begins a generator
            rows[number] = []
        except StopIteration as done:
            found[number] = done.value
            sets.pop(number, None)

    with contextlib.ExitStack() as stack:
        for number, asking in enumerate(askings):
            stack.enter_context(contextlib.closing(asking))
            ask(number)
        while sets:
            for number, part in answer(sets).items():
                rows[number].append(part)
                sets[number] = sets[number][len(part) :]
                if not len(sets[number]):
                    ask(number)
    return [found[number] for number in range(len(askings))]
