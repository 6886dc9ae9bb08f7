"""Ports: what the hook on one module's input or output reads and replaces there."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks.errors import (
    ModelError,
    NotATensorError,
    ReplacementError,
    SiteFiredTooOftenError,
    TappedModelError,
)
from maskhooks.hooks.recompute import Pass, recomputing
from maskhooks.sites import nested
from maskhooks.sites.site import Site

Replacement = Callable[[Tensor], Tensor]


class _NamelessError(TappedModelError, AttributeError):
    """A hook has no name, which torch.jit.script asks for; whoever else asks learns that as usual."""


class Uncopied:
    """What stands in a model for the length of a `with`; copies would keep it for good, so copying raises.

    Raises:
        TappedModelError: on deepcopy, pickle and torch.jit.script.
    """

    @property
    def __name__(self) -> NoReturn:
        raise _NamelessError("the model is tapped: script it outside the `with hooked.tap(...)` block")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TappedModelError("the model is tapped: copy it outside the `with hooked.tap(...)` block")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TappedModelError("the model is tapped: pickle it outside the `with hooked.tap(...)` block")


class Fired(enum.Enum):
    """When a site fired last."""

    NEVER = "not since the tap was opened"
    EARLIER = "in a pass before the latest"
    APART = "before the latest pass, in a part that the caller ran alone"
    NOW = "in the latest pass, or after it"


NOW = Fired.NOW  # at hand, since every call of a hook sets it


class Point:
    """One site within a port, and when it fired; `function` is None for a read."""

    __slots__ = ("fired", "function", "key", "path", "site")

    def __init__(self, site: Site, function: Replacement | None) -> None:
        self.site = site
        self.function = function
        self.key = str(site)
        self.path = site.path
        self.fired = Fired.NEVER

    def fires(self, call: int) -> bool:
        """Whether the site means this call.

        Raises:
            SiteFiredTooOftenError: a second call of a site that names none.
        """
        wanted = self.site.call
        if wanted is None and call:
            site, path = self.site, nested.format_path(self.path)
            raise SiteFiredTooOftenError(
                f"site {site}: module {site.module!r} ran more than once in one forward pass. Address one "
                f"call as '{site.at(0)}' (from 0), or every call as '{site.module}@*:{site.port}{path}'.",
                site=site,
            )
        if wanted is None or wanted == "*" or wanted == call:
            self.fired = NOW
            return True
        return False


class Port(Uncopied, ABC):
    """The hook on one module's input or output: the points there, and the calls so far in this pass.

    Args:
        module: the module.
        values: where values that are read go, by address.
        skipped: where optional sites without a value go, address to reason.
        state: what is known of the pass.
    """

    def __init__(
        self, module: nn.Module, values: dict[str, Tensor], skipped: dict[str, str], state: Pass | None = None
    ) -> None:
        self.module = module
        self.points: list[Point] = []
        self.reads: list[Point] = []
        self.replaces: list[Point] = []
        self.calls = 0
        self._values = values
        self._skipped = skipped
        self._pass = Pass() if state is None else state

    def add(self, point: Point) -> None:
        self.points.append(point)
        (self.reads if point.function is None else self.replaces).append(point)

    def begin(self) -> None:
        """A pass begins; calls that were counted before it are those of a part that the caller ran alone."""
        for point in self.points:
            if point.fired is NOW:
                point.fired = Fired.APART if self.calls else Fired.EARLIER
        self.calls = 0

    def missed(self) -> list[Point]:
        """Points that should have fired in the pass that ended; one that fired apart need not, if no call came."""
        return [
            point
            for point in self.points
            if point.fired is not NOW and not point.site.optional and (self.calls or point.fired is not Fired.APART)
        ]

    @abstractmethod
    def attach(self) -> RemovableHandle:
        """Registers the hook."""

    @abstractmethod
    def path(self, value: Any, point: Point) -> nested.Path:
        """Where a point's tensor stands in what the hook was given."""

    def overlap(self, one: nested.Path, other: nested.Path) -> bool:
        """Whether one of two paths leads to the other's place, or into it."""
        return all(step == also for step, also in zip(one, other, strict=False))

    def fires(self, point: Point, call: int) -> bool:
        """Whether a point means this call."""
        return point.fires(call)

    def function(self, point: Point) -> Replacement:
        """What replaces a point's value at this call."""
        assert point.function is not None
        return point.function

    def pass_through(self, value: Any) -> Any:
        """Reads and replaces at one call; returns the value to go on with, or None where it is unchanged."""
        if recomputing():
            return self._pass_again(value)
        if exported():
            raise TappedModelError("the model is tapped: trace or export it outside the `with hooked.tap(...)` block")
        call, before = self.calls, value
        self.calls += 1
        for point in self.reads:
            if self.fires(point, call):
                value = self._read(value, point, call)
        for point in self.replaces:
            if self.fires(point, call):
                value = self._replace(value, point)
            elif self._pass.perhaps_recomputed() and (old := self._get(value, point)) is not None:
                self._pass.leave(point.site, old)
        return None if value is before else value

    def _pass_again(self, value: Any) -> Any:
        """Changes a value as it was changed before, when it is computed again during backward."""
        before = value
        for point in self.reads:
            if point.fired is NOW and (old := self._get(value, point)) is not None and old.requires_grad:
                value = self._put(value, point, copied(old, old))
        for point in self.replaces:
            if point.fired is NOW and (old := self._get(value, point)) is not None:
                new = self._pass.replaced(point.site, old, self.function(point))
                value = value if new is None else self._put(value, point, copied(new, old))
        return None if value is before else value

    def _read(self, value: Any, point: Point, call: int) -> Any:
        tensor = self._get(value, point)
        if tensor is None:
            return value
        self._pass.fired()
        key = str(point.site.at(call)) if point.site.call == "*" else point.key
        if torch.is_grad_enabled() and tensor.requires_grad:
            self._values[key] = tensor
            return self._put(value, point, copied(tensor, tensor))
        self._values[key] = tensor.clone()
        return value

    def _replace(self, value: Any, point: Point) -> Any:
        old = self._get(value, point)
        if old is None:
            return value
        function = self.function(point)
        with self._pass.replacing(point.site, old) as made:
            new: Any = function(old)
            made += [new] if isinstance(new, Tensor) else []
        if not isinstance(new, Tensor):
            got = nested.describe(new)
        elif (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            got = f"{list(new.shape)} {new.dtype} {new.device}"
        else:
            if new.requires_grad and not old.requires_grad:
                self._pass.learning.append(point.site)
            # A copy: the model may go on to change it in place, and the function's tensor may come again.
            return self._put(value, point, new if new is old else copied(new, old))
        raise ReplacementError(
            f"site {point.key}: the replacement is {got}, the value is {list(old.shape)} {old.dtype} "
            f"{old.device}. Return a tensor like the value, for example new.to(value) or "
            "new.expand_as(value).",
            site=point.site,
        )

    def _get(self, value: Any, point: Point) -> Tensor | None:
        """The tensor at a point; None, and a note of the reason, where an optional site has none."""
        inside: list[str] = []
        try:
            found = nested.get(value, self.path(value, point))
            if isinstance(found, Tensor) and not found.is_nested:
                return _with_numbers(found, point)
            what = _NESTED if isinstance(found, Tensor) else f"the value is {nested.describe(found)}"
            inside = [f"'{point.key}{nested.format_path(path)}'" for path, _ in nested.tensors(found)]
        except nested.PathError as error:
            what = str(error)
        if point.site.optional:
            self._skipped[point.key] = what
            return None
        if what == _NESTED:
            raise NotATensorError(f"site {point.key}: {what}", site=point.site)
        way_out = f"one of {', '.join(inside[:5])}" if inside else "another part of the value"
        raise NotATensorError(f"site {point.key}: no tensor there; {what}. Address {way_out}.", site=point.site)

    def _put(self, value: Any, point: Point, new: Tensor) -> Any:
        try:
            return nested.put(value, self.path(value, point), new)
        except TypeError as error:
            raise ReplacementError(
                f"site {point.key}: {error}. Address a site inside module {point.site.module!r}, or the "
                "place where this value is used; to read it without a gradient, run the model under "
                "torch.no_grad().",
                site=point.site,
            ) from error


_NESTED = (
    "the value is a nested tensor, which has no shape. A torch TransformerEncoder makes them of padded batches in eval "
    "mode: build it with enable_nested_tensor=False, or set encoder.use_nested_tensor = False. Elsewhere address a "
    "place before values are nested, or after torch.nested.to_padded_tensor."
)


def _with_numbers(tensor: Shaped[Tensor, "*shape"], point: Point) -> Shaped[Tensor, "*shape"]:
    if tensor.is_meta:
        raise ModelError(
            f"site {point.key}: the value is on the meta device, so it has a shape and no numbers. Load the model's "
            "weights first: with from_pretrained, or with model.to_empty(device='cpu') and model.load_state_dict(...).",
            module=point.site.module,
        )
    return tensor


def copied(new: Shaped[Tensor, "*shape"], old: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A copy that lies in memory as `old` does: in which order numbers are added up may depend on it, and so bits."""
    copy = new.clone()
    if copy.layout is not torch.strided or copy.stride() == old.stride() or _overlaps(old):
        return copy
    return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device).copy_(new)


def _overlaps(tensor: Tensor) -> bool:
    """Whether one place in memory may hold several numbers, as in an expanded tensor."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= last:
                return True
            last += stride * (size - 1)
    return False


def exported() -> bool:
    """Whether the model is being traced or exported, which would keep the hooks for good."""
    exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call] # torch's own
    return tracing or (exporting is not None and exporting())
