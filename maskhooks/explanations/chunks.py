"""Chunks: data of any size, in the pieces that become a file each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from maskhooks.errors import BatchError, ResumeError, SettingError
from maskhooks.sites import nested


class Chunks:
    """Goes through data once and yields `(number, items)`, a chunk for each file.

    Which examples a chunk has, and how they are batched, depends on nothing but the data and the settings.

    Args:
        data: batches; with `collate`, examples.
        collate: makes a batch of a list of examples.
        batch_size: with `collate`, examples in a batch.
        length: with `collate`, how long an example is: those of like length share a batch.
        batches: in a chunk.
        part: `(i, n)`, which chunks are `mine`: every n-th, from the i-th on.

    Raises:
        SettingError: a number is out of range.
    """

    def __init__(
        self,
        data: Iterable[Any],
        collate: Callable[[list[Any]], Any] | None,
        batch_size: int,
        length: Callable[[Any], int] | None,
        batches: int,
        part: tuple[int, int],
    ) -> None:
        for name, value in {"batch_size": batch_size, "batches": batches}.items():
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"{name} is a whole number from 1, got {value!r}")
        which, parts = part
        if not 0 <= which < parts:
            raise SettingError(f"part {which} of {parts} is none: parts are counted from 0, as in (0, 4) to (3, 4)")
        if length is not None and collate is None:
            raise SettingError("length sorts examples, and batches are given: give examples, and collate")
        self.data, self.collate, self.length = data, collate, length
        self.batch_size, self.batches = batch_size, batches
        self.which, self.parts = which, parts

    @property
    def size(self) -> int:
        """Items in a chunk."""
        return self.batches * (self.batch_size if self.collate is not None else 1)

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        items = iter(self.data)
        for number in itertools.count():
            chunk = list(itertools.islice(items, self.size))
            if not chunk:
                return
            yield number, chunk

    def mine(self, number: int) -> bool:
        return number % self.parts == self.which

    def share(self, total: int | None) -> int | None:
        """How many of all examples are in chunks of mine; None where nobody knows."""
        if total is None or (self.collate is None and self.parts > 1):
            return None
        if self.parts == 1:
            return total
        firsts = range(self.which * self.size, total, self.parts * self.size)
        return sum(min(self.size, total - first) for first in firsts)

    def made(self, items: list[Any], first: int) -> Iterator[tuple[Any, list[int] | int | None]]:
        """The batches of a chunk, with the numbers of their examples; None where a batch follows the one before.

        Args:
            first: the number of the chunk's first example.
        """
        if self.collate is None:
            for index, batch in enumerate(items):
                yield batch, None if index else first
            return
        order = list(range(len(items)))
        if self.length is not None:
            length = self.length
            order.sort(key=lambda index: length(items[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.collate([items[index] for index in chosen]), [first + index for index in chosen]

    def count(self, items: list[Any]) -> int:
        """How many examples a chunk has.

        Raises:
            BatchError: the batches do not say.
        """
        if self.collate is not None:
            return len(items)
        return sum(map(_examples, items))

    def check(self, items: list[Any], count: int, path: Path | None = None) -> None:
        """Compares a chunk with the number of examples that came of it.

        Args:
            path: the file that holds them from an earlier call.

        Raises:
            ResumeError: the data are others than in the earlier call.
            BatchError: batches hold other numbers of examples than seemed, so parts cannot be numbered.
        """
        if self.collate is None and self.parts == 1:
            return
        found = self.count(items)
        if found != count and path is not None:
            raise ResumeError(
                f"{path} holds {count} examples, and the data now give {found} in its place. Give the same data, or "
                "choose another folder.",
                differences=[f"examples in {path.name}"],
            )
        if found != count:
            raise BatchError(
                f"batches of {found} examples, by the first axis of their first tensor, gave {count}. For parts give "
                "single examples, and make batches of them: explain_to(examples, folder, collate=...)"
            )

    def settings(self) -> dict[str, Any]:
        """What must be the same for the chunks to be the same, but for the data."""
        return {
            "batch_size": self.batch_size if self.collate is not None else None,
            "batches": self.batches,
            "by_length": self.length is not None,
        }


def _examples(batch: Any) -> int:
    for _, tensor in nested.tensors(batch):
        if tensor.dim():
            return len(tensor)
    raise BatchError(
        "how many examples a batch holds is not known, since it has no tensor. For parts give single examples, and "
        "make batches of them: explain_to(examples, folder, collate=...)"
    )
