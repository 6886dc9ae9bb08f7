"""Epochs: repeated passes over batches, in an order drawn from (seed, epoch), resumable at any batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Generator

from maskhooks.errors import EmptyLoaderError
from maskhooks.progress import length
from maskhooks.seeds import seeded

_NESTED = ("sampler", "batch_sampler", "batches")  # loader attributes that may draw the order


class Epochs:
    """A rank's batches in each epoch; the same (seed, epoch) gives the same batches.

    Each batch sets the global random seed from (seed, epoch, number). Each epoch seeds the generators of the loader and
    its samplers from (seed, epoch), and calls `set_epoch` on those that have it. A loader with any other source of
    randomness gives different batches after a resume; the resume detects this.

    A round has one batch per rank; rank r takes batch r of each round. In the last round some ranks may get None, so
    that each batch is used once and no rank waits for another.

    Args:
        batches: a DataLoader, or any iterable that can be iterated again.
        seed: the seed of the order.
        rank, world_size: this process's rank, and the number of processes.
    """

    def __init__(self, batches: Iterable[Any], seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.batches, self.seed, self.rank, self.world_size = batches, seed, rank, world_size

    @property
    def rounds(self) -> int | None:
        """The number of steps in an epoch; None if the loader has no length."""
        batches = length(self.batches)
        return None if batches is None else math.ceil(batches / self.world_size)

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Seed the loader's generators inside the `with` block, and restore them afterwards."""
        before = [(generator, generator.get_state()) for generator in self._generators()]
        self._begin(0)
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)

    def batches_from(self, epoch: int = 0, index: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Yield epoch, round and batch (None for a rank without one) endlessly, starting at a round of an epoch.

        Raises:
            EmptyLoaderError: an epoch has no batch.
        """
        if epoch and getattr(self.batches, "needs_first_epoch", False):
            for _ in self._epoch(0):
                pass
        while True:
            count = 0
            for count, batch in enumerate(self._epoch(epoch), 1):
                if count > index:
                    yield epoch, count - 1, batch
            if not count:
                raise EmptyLoaderError(f"the training loader yields no batch in epoch {epoch}. Give a list of batches.")
            epoch, index = epoch + 1, 0

    def first_epoch(self) -> Iterator[tuple[int, Any]]:
        """Yield this rank's batches of the first epoch, each with its index among all batches."""
        for index, batch in enumerate(self._epoch(0)):
            if batch is not None:
                yield index * self.world_size + self.rank, batch

    def _epoch(self, epoch: int) -> Iterator[Any]:
        """This rank's batch of each round."""
        own, place = None, -1
        for place, batch in self._all(epoch):
            if place == self.rank:
                own = batch
            if place == self.world_size - 1:
                yield own
                own = None
        if 0 <= place < self.world_size - 1:
            yield own

    def _all(self, epoch: int) -> Iterator[tuple[int, Any]]:
        """Every batch, with its index in its round."""
        self._begin(epoch)
        batches, number = iter(self.batches), 0
        while True:
            torch.manual_seed(seeded(self.seed, epoch, number))
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield number % self.world_size, batch
            number += 1

    def _begin(self, epoch: int) -> None:
        torch.manual_seed(seeded(self.seed, epoch, 0))
        for generator in self._generators():
            generator.manual_seed(seeded(self.seed, epoch))
        for part in _parts(self.batches):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def _generators(self) -> list[Generator]:
        found = [getattr(part, "generator", None) for part in _parts(self.batches)]
        return list({id(one): one for one in found if isinstance(one, Generator)}.values())


def _parts(loader: Any) -> Iterator[Any]:
    """A loader, and the samplers that draw its order."""
    yield loader
    for name in _NESTED:
        if (part := getattr(loader, name, None)) is not None:
            yield from _parts(part)
