"""Epochs: batches gone through again and again, in an order drawn from (seed, epoch), from any place on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Generator

from maskhooks.errors import EmptyLoaderError
from maskhooks.seeds import seeded

_NESTED = ("sampler", "batch_sampler", "batches")  # where loaders keep what draws their order


class Epochs:
    """A rank's batches of each epoch: the same ones for the same (seed, epoch).

    Before each batch the global random state is set from (seed, epoch, number), and generators of a loader or its
    samplers from (seed, epoch); `set_epoch` is called where one of them has it. A loader that draws from anything else
    gives other batches after a resume, which is noticed there.

    Of several ranks, rank r takes batch r of each round of as many batches as there are ranks. In the last round some
    ranks may get None: each batch is used once, and no rank waits for another.

    Args:
        batches: a DataLoader, or any iterable that can be gone through again.
        seed: of the order.
        rank, world: this process, of how many.
    """

    def __init__(self, batches: Iterable[Any], seed: int, rank: int = 0, world: int = 1) -> None:
        self.batches, self.seed, self.rank, self.world = batches, seed, rank, world

    @property
    def rounds(self) -> int | None:
        """Steps in an epoch, where the loader has a length."""
        return math.ceil(len(self.batches) / self.world) if isinstance(self.batches, Sized) else None

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Sets the loader's generators from the seed while the `with` lasts, and puts them back as they were."""
        before = [(generator, generator.get_state()) for generator in self._generators()]
        self._begin(0)
        try:
            yield
        finally:
            for generator, state in before:
                generator.set_state(state)

    def stream(self, epoch: int = 0, index: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Epoch, round and batch (None for a rank without one), from a place on, without end.

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

    def once(self) -> Iterator[tuple[int, Any]]:
        """This rank's batches of the first epoch, each with its number among all."""
        for index, batch in enumerate(self._epoch(0)):
            if batch is not None:
                yield index * self.world + self.rank, batch

    def _epoch(self, epoch: int) -> Iterator[Any]:
        """This rank's batch of each round."""
        own, place = None, -1
        for place, batch in self._all(epoch):
            if place == self.rank:
                own = batch
            if place == self.world - 1:
                yield own
                own = None
        if 0 <= place < self.world - 1:
            yield own

    def _all(self, epoch: int) -> Iterator[tuple[int, Any]]:
        """Every batch, with its place in its round."""
        self._begin(epoch)
        batches, number = iter(self.batches), 0
        while True:
            torch.manual_seed(seeded(self.seed, epoch, number))
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield number % self.world, batch
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
    """A loader, and what it draws its order from."""
    yield loader
    for name in _NESTED:
        if (part := getattr(loader, name, None)) is not None:
            yield from _parts(part)
