"""Time steps: read and replace the states that a module computes in sequence within one call, as one value."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks.hooks.module_ports import OutputPort
from maskhooks.hooks.port import Point, Replacement, copied
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site


class Steps(nn.Module):
    """Receives a sequence's states, one per call, while an adapter has opened the module that computes them.

    An address without a call means all steps: the value is `batch step hidden`, in the order of the sequence. With a
    call it means one step, `batch hidden`; calls count in the order of computation.
    """

    def __call__(self, state: Shaped[Tensor, "batch hidden"], step: int, steps: int) -> Shaped[Tensor, "batch hidden"]:
        """Call the module; in a third of the usual time if a single tap is its only hook."""
        if len(self._forward_hooks) == 1 and not self._forward_pre_hooks and not torch.is_grad_enabled():
            (hook,) = self._forward_hooks.values()
            if isinstance(hook, StepsPort):
                new: Tensor | None = hook(self, (state, step, steps), state)
                return state if new is None else new
        passed: Tensor = super().__call__(state, step, steps)
        return passed

    def forward(self, state: Shaped[Tensor, "batch hidden"], step: int, steps: int) -> Shaped[Tensor, "batch hidden"]:
        """Return the state.

        Args:
            state: the state of one step.
            step: its index in the sequence.
            steps: the length of the sequence.
        """
        return state


def one_step(site: Site, pattern: Pattern) -> Site:
    """Return the site of one step, with the pattern of all steps without the second axis, the step.

    The site is unchanged if that axis is split, or the only gated one.
    """
    gone, *split = pattern.axes[1] if len(pattern.axes) > 1 else ("", "")
    if split or pattern.gated == (gone,):
        return site
    left, right = ([word for word in side.split() if word != gone] for side in pattern.arrow.split("->"))
    return dataclasses.replace(site, pattern=Pattern(f"{' '.join(left)} -> {' '.join(right)}", pattern.sizes))


class Stepwise(ABC):
    """A replacement that differs between steps or portions."""

    @abstractmethod
    def __call__(self, value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return the replacement of a whole value."""

    @abstractmethod
    def at(self, step: int) -> Replacement:
        """Return the function for one step's states, `batch 1 hidden`."""

    def on(self, step: int, state: Shaped[Tensor, "batch hidden"]) -> Shaped[Tensor, "batch hidden"]:
        """Return the replacement of one step's states, when no gradient is needed."""
        return self.at(step)(state.unsqueeze(1)).squeeze(1)

    @abstractmethod
    def rows(self, begin: int, end: int) -> Replacement:
        """Return the function for some rows of a value that comes in portions."""


class StepsPort(OutputPort):
    """The hook on `Steps`.

    A function that replaces all steps is called at each with `batch 1 hidden`, a state computed from earlier
    replacements. It returns the same shape, or all steps at once, of which the current step is taken.
    """

    _step, _steps = 0, 1
    _begin = _end = _sequence = 0  # the calls of the current sequence, and the number of sequences before it
    _only: Stepwise | None = None  # the only function, if it replaces all steps and nothing is read

    def attach(self) -> RemovableHandle:
        self._states: dict[str, list[Tensor]] = {}
        (point,) = self.points if len(self.points) == 1 else (None,)
        whole = point is not None and point.site.call is None
        self._only = point.function if whole and point is not None and isinstance(point.function, Stepwise) else None
        return self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        _, self._step, self._steps = args
        if not self.calls or self.calls >= self._end:
            self._sequence = self._sequence + 1 if self.calls else 0
            self._begin, self._end = self.calls, self.calls + self._steps
        if self._only is None or torch.is_grad_enabled() or self.calls == self._begin:
            return self.pass_through(output)
        self.calls += 1  # the same as pass_through after a first step, in a third of the time
        new = self._only.on(self._step, output)
        if new.shape == output.shape and new.dtype == output.dtype:
            return new
        return self._replace(output, self.replaces[0])

    def fires(self, point: Point, call: int) -> bool:
        return point.fires(call if point.site.call is not None else self._sequence)

    def function(self, point: Point) -> Replacement:
        function = super().function(point)
        if point.site.call is not None:
            return function
        step, steps = self._step, self._steps
        own = function.at(step) if isinstance(function, Stepwise) else function

        def replace(state: Tensor) -> Tensor:
            new: Any = own(state.unsqueeze(1))
            if not isinstance(new, Tensor) or new.dim() != 3 or new.shape[1] not in (1, steps):
                return new  # type: ignore[no-any-return] # refused by the port
            return new[:, step if new.shape[1] == steps else 0]

        return replace

    def _read(self, value: Any, point: Point, call: int) -> Any:
        if point.site.call is not None:
            return super()._read(value, point, call)
        self._pass.fired()
        learns = torch.is_grad_enabled() and value.requires_grad
        if call == self._begin:
            self._states[point.key] = [value] * self._steps
        states = self._states[point.key]
        states[self._step] = value if learns else value.clone()
        if call + 1 == self._end:
            self._values[point.key] = torch.stack(self._states.pop(point.key), 1)
        return copied(value, value) if learns else value
