"""Several parts: a value that a module computes in portions, one call each, is read and replaced as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from maskhooks.errors import NotATensorError, ReplacementError
from maskhooks.hooks.module_ports import InputPort, OutputPort
from maskhooks.hooks.port import Point, Port, Replacement, copied
from maskhooks.hooks.recompute import recomputing
from maskhooks.hooks.time_steps import Stepwise


class Parts(nn.Module):
    """Where portions of a value pass, one a call, while an adapter has opened the module that computes them.

    An address without a call means all portions of a pass: the value is these below each other along the first axis,
    in the order of computation. With a call it means one portion.

    A portion may be rows of states, by their numbers: then these two are the input, to be read without picking the
    rows. Of all portions together, states that come again are there once, and numbers count through all states.

    Args:
        apart: portions are made to be read here and are used nowhere else, so that they are read without a copy.
        widened: portions are rows of features, of which narrower ones are filled up with zeros when they are read.
    """

    def __init__(self, *, apart: bool = False, widened: bool = False) -> None:
        super().__init__()
        self.apart, self.widened = apart, widened

    def forward(
        self, part: Shaped[Tensor, "row *feature"], numbers: Int[Tensor, " picked"] | None = None
    ) -> Shaped[Tensor, "_ *feature"]:
        """The portion to go on with; of states, the rows with these numbers where someone reads them."""
        return part if numbers is None or not self._forward_hooks else part.index_select(0, numbers)


class PartsPort(OutputPort):
    """The hook on `Parts`.

    What replaces all portions is called at each of them. It returns the same shape, or all portions at once, of which
    the portion's own rows are taken.
    """

    _begin = _end = 0  # the rows of the portion at hand

    def attach(self) -> RemovableHandle:
        if self.module.apart:
            _check_only_read(self)
        self._parts: dict[str, list[Tensor]] = {}
        self._apart = bool(self.module.apart) and not self.replaces and len(self.reads) == 1
        return self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        if not recomputing():
            self._begin = self._end if self.calls else 0
            self._end = self._begin + len(output)
        return self.pass_through(output)

    def fires(self, point: Point, call: int) -> bool:
        return point.fires(call if point.site.call is not None else 0)

    def function(self, point: Point) -> Replacement:
        given = super().function(point)
        whole = point.site.call is None
        begin, end = (self._begin, self._end) if whole else (0, self._end - self._begin)
        if isinstance(given, Stepwise):
            return given.rows(begin, end)

        def replace(part: Tensor) -> Tensor:
            new: Any = given(part)
            longer = isinstance(new, Tensor) and new.dim() == part.dim() and len(new) > len(part) and whole
            return new[begin:end] if longer else new  # type: ignore[no-any-return] # else refused by the port

        return replace

    def _read(self, value: Any, point: Point, call: int) -> Any:
        if point.site.call is not None:
            return super()._read(value, point, call)
        self._pass.fired()
        learns = torch.is_grad_enabled() and value.requires_grad
        parts = self._parts.setdefault(point.key, [])
        if not call:
            parts.clear()
        alone = self._apart and len(self.module._forward_hooks) == 1
        parts.append(value if learns or alone else value.clone())
        if not self.module.widened:
            _check_widths(parts, point)
        widest = max(part.shape[-1] for part in parts) if self.module.widened else None
        same = parts if widest is None else [pad(part, (0, widest - part.shape[-1])) for part in parts]
        self._values[point.key] = torch.cat(same) if call else parts[0]
        return copied(value, value) if learns else value


class PicksPort(InputPort):
    """The hook on states and numbers from which portions are picked."""

    def attach(self) -> RemovableHandle:
        _check_only_read(self)
        self._states: list[Tensor] = []
        self._numbers: list[Tensor] = []
        return super().attach()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not recomputing():
            self._add(*args, **kwargs)
        return super().__call__(module, args, kwargs)

    def _add(self, states: Shaped[Tensor, "state *feature"], numbers: Int[Tensor, " picked"]) -> None:
        if not self.calls:
            self._states, self._numbers = [], []
        if not self._states or not torch.equal(states, self._states[-1]):
            self._states.append(states.clone())
        begin = sum(len(others) for others in self._states[:-1])
        self._numbers.append(numbers + begin)

    def fires(self, point: Point, call: int) -> bool:
        return point.fires(call if point.site.call is not None else 0)

    def _read(self, value: Any, point: Point, call: int) -> Any:
        if point.site.call is not None:
            return super()._read(value, point, call)
        self._pass.fired()
        parts = self._numbers if self.path(value, point) == (0, 1) else self._states
        _check_widths(parts, point)
        self._values[point.key] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return value


def _check_only_read(port: Port) -> None:
    """Refuses replacements where portions are made to be read.

    Raises:
        ReplacementError: there is one.
    """
    for point in port.replaces:
        raise ReplacementError(
            f"site {point.site}: what passes here is made to be read, and nothing is computed from it, so that it can "
            "only be read. Replace what the module computes, such as its messages, or its input",
            site=point.site,
        )


def _check_widths(parts: Sequence[Tensor], point: Point) -> None:
    """Refuses portions that do not go below each other.

    Raises:
        NotATensorError: they are so.
    """
    if parts[0].shape[1:] != parts[-1].shape[1:]:
        raise NotATensorError(
            f"site {point.key}: its portions have shapes {list(parts[0].shape)} and {list(parts[-1].shape)}, which "
            f"do not go below each other. Address one call, as '{point.site.at(0)}'.",
            site=point.site,
        )
