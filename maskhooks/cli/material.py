"""Material of a command: the model that MODEL means, and batches for it."""

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
_HELD_OUT = 0.1
# Two sentences of different lengths, so that a batch has padding.
_SAMPLES = (
    Record("The film is slow, but the last scene makes up for all of it."),
    Record("A lovely film."),
)


@dataclass(frozen=True)
class Portioned:
    """Data for `explain_to`.

    Args:
        data: examples or batches.
        metadata: what tells them from others, as JSON has it.
        settings: how batches are made of examples.
    """

    data: Iterable[Any]
    metadata: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """An opened model and how its batches are made.

    Args:
        name: what the user wrote for MODEL.
        opened: what its source made of it.
        columns: where a table has its texts and labels.
        batch_size: examples in a batch.
        seed: of what is drawn and shuffled.
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
        """Opens MODEL and places it on a device.

        Args:
            units: a word for what is gated together; None is what the source says.

        Raises:
            MaskhooksError: it cannot be opened, or there is no such device; or no such units are known.
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
        """One batch: of the data, of the factory's, or of two sentences; None for a model without any."""
        if data is None and self.opened.train is not None:
            for batch in self.opened.train:
                return batch
            raise EmptyLoaderError(
                f"{self.name} returned training batches that yield none. Give a list or a DataLoader"
            )
        if data is None and self.opened.batch is not None:
            return self.opened.batch(_SAMPLES)
        return None if data is None else self._batch(data)(list(itertools.islice(self._stream(data), self.batch_size)))

    def for_training(
        self, data: str | None, validation: str | None, limit: int | None
    ) -> tuple[Iterable[Any], Iterable[Any] | None]:
        """Training batches, shuffled by the seed, and validation batches: a tenth where none are given.

        Args:
            limit: records drawn from either data at most.
        """
        if data is None:
            return self._own_batches(validation, limit), self.opened.validation
        train = self._draw(list(self._stream(data)), limit)
        if validation is not None:
            held = self._draw(list(self._stream(validation)), limit)
        else:
            cut = max(1, round(len(train) * _HELD_OUT))
            held, train = train[:cut], train[cut:]
            if not train:
                raise SettingError(
                    f"{data} gives one example, of which none is left to hold out. Give more, or --validation."
                )
        return self._loader(train, shuffle=True), self._loader(held)

    def for_explaining(self, data: str | None, limit: int | None) -> Portioned:
        """What `explain_to` is given: records of the data in their order, up to a limit, or a factory's own batches."""
        if data is None:
            own = self._own_batches(None, limit)
            return Portioned(own if self.opened.validation is None else self.opened.validation, {"data": self.name})
        metadata = {"data": {**identity(data), **asdict(self.columns), "limit": limit}}
        collate = {"collate": self._batch(data), "batch_size": self.batch_size, "length": _length}
        return Portioned(itertools.islice(self._stream(data), limit), metadata, collate)

    def _own_batches(self, validation: str | None, limit: int | None) -> Iterable[Any]:
        if validation is not None or limit is not None:
            option = "--validation" if validation is not None else "--limit"
            raise SettingError(f"{option} needs --data: the batches of {self.name} are used as they are")
        if self.opened.train is None:
            way_out = (
                "give texts with --data"
                if self.opened.batch is not None
                else "have the factory return (model, training batches, validation batches)"
            )
            raise SettingError(f"there are no data for {self.name}: {way_out}")
        return self.opened.train

    def _batch(self, data: str) -> Callable[[Sequence[Record]], Any]:
        if self.opened.batch is None:
            raise SettingError(
                f"{self.name} does not say how texts become batches, so {data} is of no use to it. Leave "
                "it out, and have the factory return (model, training batches), or Opened(hooked, "
                "batch=...)."
            )
        return self.opened.batch

    def _stream(self, data: str) -> Iterator[Record]:
        self._batch(data)
        return stream(data, self.columns)

    def _draw(self, records: list[Record], limit: int | None) -> list[Record]:
        """The records in an order drawn from the seed, up to a limit: files are often sorted by label."""
        order = torch.randperm(len(records), generator=generator(self.seed, _SAMPLE))
        return [records[index] for index in order[:limit].tolist()]

    def _loader(self, records: Sequence[Record], *, shuffle: bool = False) -> Iterable[Any]:
        return DataLoader(
            records,  # type: ignore[arg-type] # a list has all that a map-style dataset needs
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=self.opened.batch,
            generator=generator(self.seed, _SHUFFLE),
        )


def _together(hooked: Hooked, units: str) -> Hooked:
    return Hooked(hooked.model, hooked.sites, hooked.task.with_options({"units": units}), hooked.claims)


def count(data: str, columns: Columns, limit: int | None) -> int:
    """How many records data have, up to a limit; errors in them are seen before the first is used."""
    return sum(1 for _ in itertools.islice(stream(data, columns), limit))


def _length(record: Record) -> int:
    """About how many tokens a record has: its letters will do."""
    return len(record.text) + len(record.text_pair or "")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"no device {name!r} can be used here ({str(error).splitlines()[0]}). Give cpu, or one that torch lists."
        ) from error
    return device
