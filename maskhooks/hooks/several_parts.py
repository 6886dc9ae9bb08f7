"""Several parts: read and replace a value that a module computes in portions, one call each, as one value."""

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
    """Receives portions of a value, one per call, while an adapter has opened the module that computes them.

    An address without a call means all portions of a pass, concatenated along the first axis in the order of
    computation. With a call it means one portion.

    A portion may be rows of states picked by index. The input is then the states and the indices, and reading it
    picks no rows. Over all portions, repeated states appear once, and indices count through all states.

    Args:
        apart: portions are made only to be read here, so they are read without a copy.
        widened: portions are rows of features; narrower ones are padded with zeros when read.
    """

    def __init__(self, *, apart: bool = False, widened: bool = False) -> None:
        super().__init__()
        self.apart, self.widened = apart, widened

    def forward(
        self, part: Shaped[Tensor, "row *feature"], numbers: Int[Tensor, " picked"] | None = None
    ) -> Shaped[Tensor, "_ *feature"]:
        """Return the portion; of states, the rows with these indices if a hook reads them."""
        return part if numbers is None or not self._forward_hooks else part.index_select(0, numbers)


class PartsPort(OutputPort):
    """The hook on `Parts`.

    A function that replaces all portions is called for each. It returns the same shape, or all portions at once, of
    which the current portion's rows are taken.
    """

    _begin = _end = 0  # the rows of the current portion

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
        function = super().function(point)
        whole = point.site.call is None
        begin, end = (self._begin, self._end) if whole else (0, self._end - self._begin)
        if isinstance(function, Stepwise):
            return function.rows(begin, end)

        def replace(part: Tensor) -> Tensor:
            new: Any = function(part)
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
    """The hook on states and on the indices that pick portions of them."""

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
    """Refuse replacements where portions can only be read.

    Raises:
        ReplacementError: there is one.
    """
    for point in port.replaces:
        raise ReplacementError(
            f"site {point.site}: this value can only be read, because nothing is computed from it. "
            "Replace what the module computes, such as its messages, or its input",
            site=point.site,
        )


def _check_widths(parts: Sequence[Tensor], point: Point) -> None:
    """Refuse portions that cannot be concatenated.

    Raises:
        NotATensorError: their shapes differ after the first axis.
    """
    if parts[0].shape[1:] != parts[-1].shape[1:]:
        raise NotATensorError(
            f"site {point.key}: its portions have shapes {list(parts[0].shape)} and {list(parts[-1].shape)}, which "
            f"cannot be concatenated. Address one call, such as '{point.site.at(0)}'.",
            site=point.site,
        )
