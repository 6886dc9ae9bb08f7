"""Chunks: data of any size, split into pieces that each become one file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from maskhooks.errors import BatchError, ResumeError, SettingError
from maskhooks.sites import nested


class Chunks:
    """Iterate over data once and yield `(number, items)`, one chunk for each file.

    The examples of a chunk and their batches depend only on the data and the settings.

    Args:
        data: batches, or examples if `collate` is given.
        collate: makes a batch from a list of examples.
        batch_size: examples per batch, with `collate`.
        length: returns the length of an example, with `collate`; examples of similar length share a batch.
        batches: batches per chunk.
        shard: `(i, n)`: every n-th chunk, starting at the i-th, is `mine`.

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
        shard: tuple[int, int],
    ) -> None:
        for name, value in {"batch_size": batch_size, "batches": batches}.items():
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"{name} must be a whole number of at least 1, got {value!r}")
        which, parts = shard
        if not 0 <= which < parts:
            raise SettingError(f"there is no shard {which} of {parts}. Shards count from 0, as in (0, 4) to (3, 4)")
        if length is not None and collate is None:
            raise SettingError("length sorts examples, but the data are batches. Give examples and collate")
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
        """How many of all examples are in my chunks; None if unknown."""
        if total is None or (self.collate is None and self.parts > 1):
            return None
        if self.parts == 1:
            return total
        firsts = range(self.which * self.size, total, self.parts * self.size)
        return sum(min(self.size, total - first) for first in firsts)

    def made(self, items: list[Any], first: int) -> Iterator[tuple[Any, list[int] | int | None]]:
        """Yield the batches of a chunk with their example indices; None if a batch continues the one before.

        Args:
            first: the index of the chunk's first example.
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
        """Return the number of examples in a chunk.

        Raises:
            BatchError: the batches do not show their size.
        """
        if self.collate is not None:
            return len(items)
        return sum(map(_examples, items))

    def check(self, items: list[Any], count: int, path: Path | None = None) -> None:
        """Compare a chunk with the number of examples it produced.

        Args:
            path: the file with the rows of an earlier call.

        Raises:
            ResumeError: the data differ from those of the earlier call.
            BatchError: batches hold other numbers of examples than their shape shows, so shards cannot number them.
        """
        if self.collate is None and self.parts == 1:
            return
        found = self.count(items)
        if found != count and path is not None:
            raise ResumeError(
                f"{path} holds {count} examples, but the data now give {found} for it. Give the same data, or choose "
                "another folder.",
                differences=[f"examples in {path.name}"],
            )
        if found != count:
            raise BatchError(
                f"batches with {found} examples, by the first axis of their first tensor, gave {count}. For shards, "
                "give single examples and batch them: explain_to(examples, folder, collate=...)"
            )

    def settings(self) -> dict[str, Any]:
        """The settings, besides the data, that determine the chunks."""
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
        "the number of examples in a batch is unknown, because it has no tensor. For shards, give single examples "
        "and batch them: explain_to(examples, folder, collate=...)"
    )
