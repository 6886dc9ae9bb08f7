"""Displaced values: explain a batch as if a site had a value beside its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Generator, Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.time_steps import Stepwise
from maskhooks.model.attention import Attended
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs
from maskhooks.model.task import Task
from maskhooks.sites.site import Site


@dataclass(frozen=True)
class Displaced:
    """A batch, and what is added to the value of a site for it.

    Attributes:
        batch: the batch.
        shift: what is added, of the shape of the value.
    """

    batch: Any
    shift: Tensor


@contextlib.contextmanager
def displacing(hooked: Hooked, site: Site, axis: int | None) -> Iterator[None]:
    """Let a `Hooked` take `Displaced` batches, within a `with`.

    Args:
        hooked: the wrapped model.
        site: the site whose value is shifted.
        axis: the batch axis of the value; None if rows belong to examples by an index.
    """
    task = hooked.task
    hooked.task = serving = _Serving(task, site, axis)
    try:
        # an explainer's own taps see what this one returns; a pass that begins behind the site does not reach it
        with hooked.tap(replace={dataclasses.replace(site, optional=True): _Shift(serving, site)}):
            yield
    finally:
        hooked.task = task


class _Shift(Stepwise):
    """The replacement that adds the shift of the batch that runs, to a value, a step or a portion of it."""

    def __init__(self, serving: _Serving, site: Site) -> None:
        self._serving, self._site = serving, site

    def __call__(self, value: Shaped[Tensor, "*value"]) -> Shaped[Tensor, "*value"]:
        return self._added(value, self._serving.shift)

    def at(self, step: int) -> Replacement:
        return lambda state: self._added(state, self._serving.shift[:, step : step + 1])

    def on(self, step: int, state: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch hidden"]:
        return self._added(state, self._serving.shift[:, step])

    def rows(self, begin: int, end: int) -> Replacement:
        return lambda part: self._added(part, self._serving.shift[begin:end])

    def _added(self, value: Tensor, shift: Tensor) -> Tensor:
        if value.shape != shift.shape:
            raise SettingError(
                f"site {self._site} has a value of shape {list(value.shape)} where {list(shift.shape)} was expected: "
                "the explainer runs the model on other rows. Say how to select examples, "
                "wrap(model, select=lambda batch, numbers: ...), or judge an explainer that runs whole batches"
            )
        return value + shift.to(value)


class _Serving(Task):
    """A task whose batches carry a shift; everything else is up to the task that it stands for."""

    def __init__(self, task: Task, site: Site, axis: int | None) -> None:
        super().__init__()
        self._task, self._site, self._axis = task, site, axis
        self.shift = torch.zeros(())
        self.name, self.recipe, self.options = task.name, task.recipe, task.options

    def call(self, model: nn.Module, batch: Any) -> Any:
        self.shift = batch.shift
        return self._task.call(model, batch.batch)

    def attention(self, model: nn.Module, batch: Any) -> Attended:
        self.shift = batch.shift
        return self._task.attention(model, batch.batch)

    def select(self, batch: Any, numbers: Sequence[int], count: int) -> Any:
        if self._axis is None:
            raise SettingError(
                f"the explainer selects examples, and the rows of site {self._site} belong to them by an index. Give "
                "batches of one example"
            )
        rows = batch.shift.movedim(self._axis, 0)[list(numbers)].movedim(0, self._axis)
        return Displaced(self._task.select(batch.batch, numbers, count), rows)

    def select_rows(self, batch: Any, numbers: Sequence[int]) -> None:
        return None  # whole batches will do

    def without_tokens(self, batch: Any, removed: Tensor) -> None:
        return None

    def perturb(self, batch: Any, generator: Generator) -> None:
        return None

    def distribution(self, result: Any, batch: Any) -> Outputs:
        return self._task.distribution(result, batch.batch)

    def valid(self, site: Site, batch: Any, value: Tensor) -> Tensor:
        return self._task.valid(site, batch.batch, value)

    def units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Tensor | None:
        return self._task.units(site, batch.batch, values)

    def example_index(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Tensor | None:
        return self._task.example_index(site, batch.batch, values)

    def edges(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        return self._task.edges(site, batch.batch, values)

    def names(self, site: Site, batch: Any) -> Sequence[Sequence[str]] | None:
        return self._task.names(site, batch.batch)

    def targets(self, batch: Any) -> Sequence[str] | None:
        return self._task.targets(batch.batch)

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        return self._task.predictions(result)

    def dependencies(self, site: Site) -> Sequence[Site]:
        return self._task.dependencies(site)

    @property
    def unit_name(self) -> str | None:
        return self._task.unit_name

    @property
    def mask_token(self) -> int | None:
        return self._task.mask_token
