"""The model and the batches of a command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from maskhooks.data.records import Columns, Record, identity, stream
from maskhooks.errors import EmptyLoaderError, SettingError
from maskhooks.model.hooked import Hooked
from maskhooks.model.source import SOURCES, Opened, choose
from maskhooks.plugins.registry import registry
from maskhooks.seeds import generator

_SAMPLE, _SHUFFLE = 200, 201
_HELD_OUT, _MOST_HELD_OUT = 0.1, 500
_VALIDATED = 32  # examples in a batch that serves to validate
# The two sentences have different lengths, so the batch has padding.
_SAMPLES = (
    Record("The film is slow, but the last scene makes up for all of it."),
    Record("A lovely film."),
)


@dataclass(frozen=True)
class Portioned:
    """Data for `explain_to`.

    Args:
        data: examples or batches.
        metadata: what identifies the data, JSON-serialisable.
        settings: how batches are made from examples.
    """

    data: Iterable[Any]
    metadata: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """An opened model, and how its batches are made.

    Args:
        name: what the user wrote for MODEL.
        opened: the model as its source opened it.
        columns: the table's columns of texts and labels.
        batch_size: examples in a batch.
        seed: the random seed of drawing and shuffling.
    """

    name: str
    opened: Opened
    columns: Columns = field(default_factory=Columns)
    batch_size: int = 32
    seed: int = 0

    @classmethod
    def of(
        cls,
        model: str,
        device: str | None = None,
        max_length: int = 128,
        *,
        units: str | None = None,
        **settings: Any,
    ) -> Material:
        """Open MODEL and place it on a device.

        Args:
            units: which positions are gated together, such as "words"; None uses the source's choice.

        Raises:
            MaskhooksError: MODEL cannot be opened, there is no such device, or the units are unknown.
        """
        opened = choose(model, registry.parts(SOURCES)).open(model, max_length=max_length)
        if units is not None:
            opened = replace(opened, hooked=_together(opened.hooked, units))
        opened.hooked.model.to(_device(device))
        return cls(model, opened, **settings)

    @property
    def hooked(self) -> Hooked:
        return self.opened.hooked

    def example(self, data: str | None) -> Any | None:
        """Return one batch: of the data, of the factory, or of two sentences; None if the model has none of these."""
        if data is None and self.opened.train is not None:
            for batch in self.opened.train:
                return batch
            raise EmptyLoaderError(f"the training batches of {self.name} yield no batch. Give a list or a DataLoader.")
        if data is None and self.opened.batch is not None:
            return self.opened.batch(_SAMPLES)
        return None if data is None else self._batch(data)(list(itertools.islice(self._stream(data), self.batch_size)))

    def for_training(
        self, data: str | None, validation: str | None, limit: int | None
    ) -> tuple[Iterable[Any], Iterable[Any] | None]:
        """Return training batches, shuffled by the seed, and validation batches: by default a tenth of the data.

        Examples of a batch have similar lengths, so that there is little padding.

        Args:
            limit: maximum number of records drawn for each of the two.
        """
        if data is None:
            return self._own_batches(validation, limit), self.opened.validation
        train = self._draw(list(self._stream(data)), limit)
        if validation is not None:
            held = self._draw(list(self._stream(validation)), limit)
        else:
            cut = min(_MOST_HELD_OUT, max(1, round(len(train) * _HELD_OUT)))
            held, train = train[:cut], train[cut:]
            if not train:
                raise SettingError(f"{data} has only one example, so none can be held out. Give more, or --validation.")
        return self._loader(train, self.batch_size, shuffle=True), self._loader(held, max(_VALIDATED, self.batch_size))

    def for_explaining(self, data: str | None, limit: int | None) -> Portioned:
        """Return the data for `explain_to`: records in order, up to a limit, or the factory's own batches."""
        if data is None:
            own = self._own_batches(None, limit)
            return Portioned(own if self.opened.validation is None else self.opened.validation, {"data": self.name})
        metadata = {"data": {**identity(data), **asdict(self.columns), "limit": limit}}
        collate = {"collate": self._batch(data), "batch_size": self.batch_size, "length": _length}
        return Portioned(itertools.islice(self._stream(data), limit), metadata, collate)

    def for_comparing(self, data: str | None, limit: int | None) -> list[Any]:
        """Return batches of records drawn by the seed, up to a limit, in order; or the factory's own batches."""
        if data is None:
            own = self._own_batches(None, limit)
            return list(own if self.opened.validation is None else self.opened.validation)
        records = list(self._stream(data))
        order = torch.randperm(len(records), generator=generator(self.seed, _SAMPLE))[:limit].sort().values.tolist()
        chosen, size = [records[index] for index in order], self.batch_size
        return [self._batch(data)(chosen[start : start + size]) for start in range(0, len(chosen), size)]

    def _own_batches(self, validation: str | None, limit: int | None) -> Iterable[Any]:
        if validation is not None or limit is not None:
            option = "--validation" if validation is not None else "--limit"
            raise SettingError(f"{option} needs --data: the batches of {self.name} are used as they are.")
        if self.opened.train is None:
            way_out = (
                "Give texts with --data."
                if self.opened.batch is not None
                else "Make the factory return (model, training batches, validation batches)."
            )
            raise SettingError(f"there is no data for {self.name}. {way_out}")
        return self.opened.train

    def _batch(self, data: str) -> Callable[[Sequence[Record]], Any]:
        if self.opened.batch is None:
            raise SettingError(
                f"{self.name} does not say how texts become batches, so it cannot use {data}. Make the factory return "
                "(model, training batches) and leave out --data, or return Opened(hooked, batch=...)."
            )
        return self.opened.batch

    def _stream(self, data: str) -> Iterator[Record]:
        self._batch(data)
        return stream(data, self.columns)

    def _draw(self, records: list[Record], limit: int | None) -> list[Record]:
        """Return the records in random order, up to a limit: files are often sorted by label."""
        order = torch.randperm(len(records), generator=generator(self.seed, _SAMPLE))
        return [records[index] for index in order[:limit].tolist()]

    def _loader(self, records: Sequence[Record], size: int, *, shuffle: bool = False) -> Iterable[Any]:
        """Return batches of records of similar length."""
        by_length = sorted(records, key=_length)
        return DataLoader(
            [by_length[start : start + size] for start in range(0, len(by_length), size)],  # type: ignore[arg-type] # a list serves as a map-style dataset
            batch_size=None,
            shuffle=shuffle,
            collate_fn=self.opened.batch,
            generator=generator(self.seed, _SHUFFLE),
        )


def _together(hooked: Hooked, units: str) -> Hooked:
    return hooked.with_(task=hooked.task.with_options({"units": units}))


def count(data: str, columns: Columns, limit: int | None) -> int:
    """Return the number of records, up to a limit; this finds errors in them before any is used."""
    return sum(1 for _ in itertools.islice(stream(data, columns), limit))


def _length(record: Record) -> int:
    """Return a measure of a record's number of tokens: its number of characters."""
    return len(record.text) + len(record.text_pair or "")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"the device {name!r} cannot be used here ({str(error).splitlines()[0]}). Give cpu, or another device."
        ) from error
    return device
