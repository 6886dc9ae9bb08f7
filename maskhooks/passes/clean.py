"""A clean pass: the model as it is, with what was read on the way and what is known of the sites' positions."""

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
    """A batch with what a clean pass saw.

    Attributes:
        hooked: the model.
        batch: what it was given.
        values: what was read, by site or address.
        result: what the model returned.
        outputs: the same as distributions.
        recording: to go on from; None to run the model in full.
        places: the positions of a site that was read and has a pattern, found out when they are first asked for.
    """

    hooked: Hooked
    batch: Any
    values: Values
    result: Any
    outputs: Outputs
    recording: Recording | None
    places: PlacesBySite = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = _Places(self.hooked, self.batch, self.values, self.outputs)  # not self: a circle lives longer
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
        self._found[site] = Places(self._task.valid(site, self._batch, value), examples, units)
        return self._found[site]

    def _examples(self, site: Site) -> ExampleIndex | None:
        """The example of each row; None where the first axis is the batch.

        Raises:
            BatchError: there are not as many numbers as rows, or larger ones than there are examples.
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
                f"site {site} has {rows} positions of {total} examples (as many as there are outputs), and the "
                f"examples given for them have shape {list(index.shape)}"
                + (f" and numbers from {low} to {high}" if index.numel() else "")
                + ". Give the number of each position's example, from 0: wrap(model, example_index=lambda batch: ...)"
            )
        return ExampleIndex(index.to(value.device), total)


def clean_pass(
    hooked: Hooked,
    batch: Any,
    reads: Iterable[Site],
    onward: Iterable[Site] = (),
    replay: Replay | None = None,
) -> Clean:
    """Runs the model as it is, without gradients.

    Args:
        reads: sites to read.
        onward: the sites that masked passes will go on from; what comes before is recorded in `replay`.
    """
    with torch.no_grad():
        if replay is not None:
            replay.trace(lambda: _untapped(hooked, batch))
        recorded = replay.record(onward) if replay is not None else contextlib.nullcontext(None)
        with hooked.tap(read=with_beside(hooked, reads)) as tap, recorded as recording:
            result = hooked(batch)
        return Clean(hooked, batch, tap.values, result, hooked.distribution(result, batch), recording)


def with_beside(hooked: Hooked, reads: Iterable[Site]) -> list[Site]:
    """The sites to read, and those that the task needs beside them."""
    wanted = list(reads)
    return list(dict.fromkeys([*wanted, *(other for site in wanted for other in hooked.task.beside(site))]))


def _untapped(hooked: Hooked, batch: Any) -> Any:
    with hooked.opened(()):  # as adapters have it while their modules are tapped
        return hooked(batch)
