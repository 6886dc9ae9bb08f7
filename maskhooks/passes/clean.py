"""Clean pass: run the unmodified model, and keep the values read and the positions of their sites."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from maskhooks.errors import BatchError
from maskhooks.hooks.replay import Recording, Replay
from maskhooks.hooks.tap import Values
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs, count
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.places import Places, PlacesBySite
from maskhooks.sites.site import Site
from maskhooks.sites.units import Units


@dataclass(frozen=True)
class Clean:
    """A batch and its clean pass.

    Attributes:
        hooked: the model.
        batch: the model's input.
        values: the values read, by site or address.
        result: what the model returned.
        outputs: the same as distributions.
        recording: what masked passes resume from; None to run the model in full.
        places: the positions of each site that was read and has a pattern, computed on first access.
    """

    hooked: Hooked
    batch: Any
    values: Values
    result: Any
    outputs: Outputs
    recording: Recording | None
    places: PlacesBySite = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = _Places(self.hooked, self.batch, self.values, self.outputs)  # not self: a reference cycle lives longer
        object.__setattr__(self, "places", places)


class _Places:
    """The places of a batch's sites."""

    def __init__(self, hooked: Hooked, batch: Any, values: Values, outputs: Outputs) -> None:
        self._found: dict[Site, Places] = {}
        self._task, self._batch, self._values, self._outputs = hooked.task, batch, values, outputs

    def __getitem__(self, site: Site) -> Places:
        if site in self._found:
            return self._found[site]
        value, examples = self._values[site], self._examples(site)
        numbers = self._task.units(site, self._batch, self._values)
        units = None if numbers is None else Units.of(numbers.to(value.device), examples)
        valid = self._task.valid(site, self._batch, value)
        if valid.numel() and not bool(valid.any()):
            raise BatchError(
                f"no position of this batch is valid at {site}: all are padding. Look at the mask, True or 1 where a "
                "position counts, and leave out batches of padding alone"
            )
        self._found[site] = Places(valid, examples, units)
        return self._found[site]

    def _examples(self, site: Site) -> ExampleIndex | None:
        """Return the example index of each row; None if the first axis is the batch axis.

        Raises:
            BatchError: the index has another length than the rows, or is out of range.
        """
        index = self._task.example_index(site, self._batch, self._values)
        if index is None:
            return None
        value = self._values[site]
        sizes = site.gating().shape(value, site=site)
        rows, total = sizes[site.gating().positions[0]], count(self._outputs)
        low, high = (int(end) for end in index.aminmax()) if index.numel() else (0, 0)
        if index.shape != (rows,) or (rows and not 0 <= low <= high < total):
            raise BatchError(
                f"site {site} has {rows} positions of {total} examples (one per output), but the example index has "
                f"shape {list(index.shape)}"
                + (f" and values from {low} to {high}" if index.numel() else "")
                + ". Give each position's example index, from 0: wrap(model, example_index=lambda batch: ...)"
            )
        return ExampleIndex(index.to(value.device), total)


def clean_pass(
    hooked: Hooked,
    batch: Any,
    reads: Iterable[Site],
    onward: Iterable[Site] = (),
    replay: Replay | None = None,
) -> Clean:
    """Run the unmodified model, without gradients.

    Args:
        reads: sites to read.
        onward: the sites that masked passes will resume from; `replay` records what comes before.
    """
    with torch.no_grad():
        if replay is not None:
            replay.trace(lambda: _untapped(hooked, batch))
        recorded = replay.record(onward) if replay is not None else contextlib.nullcontext(None)
        with hooked.tap(read=with_dependencies(hooked, reads)) as tap, recorded as recording:
            result = hooked(batch)
        return Clean(hooked, batch, tap.values, result, hooked.distribution(result, batch), recording)


def with_dependencies(hooked: Hooked, reads: Iterable[Site]) -> list[Site]:
    """Return the sites to read, and those that the task needs along with them."""
    wanted = list(reads)
    return list(dict.fromkeys([*wanted, *(other for site in wanted for other in hooked.task.dependencies(site))]))


def _untapped(hooked: Hooked, batch: Any) -> Any:
    with hooked.expose_sites(()):  # adapters set up their modules as in a tap
        return hooked(batch)
