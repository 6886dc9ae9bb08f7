"""Displaced values: explain a batch as if a site had another value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Shaped
from torch import Generator, Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.model.attention import Attended
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs
from maskhooks.model.task import Task
from maskhooks.sites.site import Site


@dataclass(frozen=True)
class Displaced:
    """A batch, and the value that a site shall have for it.

    Attributes:
        batch: the batch.
        value: the value, as the model computes it.
    """

    batch: Any
    value: Tensor


@contextlib.contextmanager
def displacing(hooked: Hooked, site: Site, axis: int | None) -> Iterator[None]:
    """Let a `Hooked` take `Displaced` batches, within a `with`.

    Args:
        hooked: the wrapped model.
        site: the site whose value is given.
        axis: the batch axis of the value; None if rows belong to examples by an index.
    """
    task = hooked.task
    serving = _Serving(task, site, axis)
    hooked.task = serving
    try:
        with hooked.tap(replace={site: serving.replacement}):  # an explainer's own taps see what this one returns
            yield
    finally:
        hooked.task = task


class _Serving(Task):
    """A task whose batches carry a value; everything else is up to the task that it stands for."""

    def __init__(self, task: Task, site: Site, axis: int | None) -> None:
        super().__init__()
        self._task, self._site, self._axis = task, site, axis
        self._value: Tensor | None = None
        self.name, self.recipe, self.options = task.name, task.recipe, task.options

    def replacement(self, old: Shaped[Tensor, "*value"]) -> Shaped[Tensor, "*value"]:
        """Return the value of the batch that runs."""
        assert self._value is not None
        if self._value.shape != old.shape:
            raise SettingError(
                f"site {self._site} has a value of shape {list(old.shape)} where {list(self._value.shape)} was "
                "expected: the explainer runs the model on other rows. Say how to select examples, "
                "wrap(model, select=lambda batch, numbers: ...), or judge an explainer that runs whole batches"
            )
        return self._value.to(old)

    def call(self, model: nn.Module, batch: Any) -> Any:
        self._value = batch.value
        return self._task.call(model, batch.batch)

    def attention(self, model: nn.Module, batch: Any) -> Attended:
        self._value = batch.value
        return self._task.attention(model, batch.batch)

    def select(self, batch: Any, numbers: Sequence[int], count: int) -> Any:
        if self._axis is None:
            raise SettingError(
                f"the explainer selects examples, and the rows of site {self._site} belong to them by an index. Give "
                "batches of one example"
            )
        rows = self._value_rows(batch.value, numbers)
        return Displaced(self._task.select(batch.batch, numbers, count), rows)

    def _value_rows(self, value: Tensor, numbers: Sequence[int]) -> Tensor:
        assert self._axis is not None
        return value.movedim(self._axis, 0)[list(numbers)].movedim(0, self._axis)

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
