"""Epochs: the same batches for the same (seed, epoch), from any place on, and each batch once over all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from maskhooks.data.epochs import Epochs
from maskhooks.errors import EmptyLoaderError
from maskhooks.passes.clean_cache import CleanCache, Stored


class Noisy(torch.utils.data.Dataset[Any]):
    """Draws from the global random state with every example."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> float:
        return index + float(torch.rand(()))


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(10).tolist()


class Told(list[Any]):
    """A loader that is told the epoch, as distributed samplers are."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return (item + 100 * self.epoch for item in super().__iter__())


def loaders() -> dict[str, Any]:
    data = TensorDataset(torch.arange(10))
    return {
        "shuffled": DataLoader(data, 3, shuffle=True),
        "with a generator": DataLoader(data, 3, shuffle=True, generator=torch.Generator().manual_seed(1)),
        "a sampler's generator": DataLoader(
            data, 3, sampler=WeightedRandomSampler([1.0] * 10, 10, generator=torch.Generator())
        ),
        "noisy data": DataLoader(Noisy(), 3),
        "workers": DataLoader(Noisy(), 3, shuffle=True, num_workers=1),
        "a stream": DataLoader(Streamed(), 3),
        "a list": list(range(4)),
        "told": Told(range(4)),
        "stored": Stored(DataLoader(data, 3, shuffle=True), 0, CleanCache()),
    }


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(part) for part in batch] if isinstance(batch, (list, tuple)) else batch


def taken(epochs: Epochs, count: int, epoch: int = 0, index: int = 0) -> list[Any]:
    found = []
    for place, number, batch in itertools.islice(epochs.batches_from(epoch, index), count):
        torch.rand(5)  # what a step draws must not matter
        found.append((place, number, plain(batch)))
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", loaders())
def test_from_any_place_on(name: str) -> None:
    whole = taken(Epochs(loaders()[name], 3), 11)
    assert [number for _, number, _ in whole] == [0, 1, 2, 3] * 2 + [0, 1, 2]
    for epoch, index in ((0, 1), (0, 4), (1, 0), (1, 3), (2, 0)):
        torch.rand(3)
        assert taken(Epochs(loaders()[name], 3), 2, epoch, index) == whole[4 * epoch + index :][:2]


@pytest.mark.parametrize("name", ["shuffled", "with a generator", "told", "stored"])
def test_epochs_and_seeds_differ(name: str) -> None:
    whole = [batch for *_, batch in taken(Epochs(loaders()[name], 3), 8)]
    assert whole[:4] != whole[4:]
    if name != "told":
        assert whole != [batch for *_, batch in taken(Epochs(loaders()[name], 4), 8)]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_each_batch_once_over_all_ranks(world: int) -> None:
    whole = [batch for *_, batch in taken(Epochs(loaders()["shuffled"], 3), 8)]
    ranks = [Epochs(loaders()["shuffled"], 3, rank, world) for rank in range(world)]
    rounds = -(-4 // world)
    assert ranks[0].rounds == rounds
    found = [taken(rank, 2 * rounds) for rank in ranks]
    for epoch in range(2):
        part = [row[epoch * rounds : (epoch + 1) * rounds] for row in found]
        assert all([place[:2] for place in row] == [(epoch, index) for index in range(rounds)] for row in part)
        batches = [place[2] for together in zip(*part, strict=True) for place in together]
        assert batches == whole[4 * epoch : 4 * epoch + 4] + [None] * (rounds * world - 4)


def test_once_over_for_validation() -> None:
    numbers = [[number for number, _ in Epochs(list("abcde"), 0, rank, 2).first_epoch()] for rank in range(2)]
    assert numbers == [[0, 2, 4], [1, 3]]


def test_generators_are_put_back() -> None:
    loader = loaders()["with a generator"]
    before = loader.generator.get_state()
    epochs = Epochs(loader, 3)
    with epochs.seeded():
        taken(epochs, 5)
        assert not torch.equal(loader.generator.get_state(), before)
    assert torch.equal(loader.generator.get_state(), before)


def test_a_loader_that_runs_dry() -> None:
    class Once(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            while self:
                yield self.pop()

    with pytest.raises(EmptyLoaderError, match="epoch 1"):
        taken(Epochs(Once([1, 2]), 0), 3)
