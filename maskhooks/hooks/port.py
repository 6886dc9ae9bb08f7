"""Ports: hooks that read and replace values at one module's input or output."""

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
from maskhooks.hooks.threads import check_thread
from maskhooks.sites import nested
from maskhooks.sites.site import Site

Replacement = Callable[[Tensor], Tensor]


class _NamelessError(TappedModelError, AttributeError):
    """torch.jit.script asked for a hook's name; other callers see the usual AttributeError."""


class Uncopied:
    """An object that is in a model during a `with`; a copy would keep it for good, so copying raises.

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
    """When a site last fired."""

    NEVER = "not since the tap was opened"
    EARLIER = "in a pass before the latest"
    APART = "before the latest pass, in a part that the caller ran alone"
    NOW = "in the latest pass, or after it"


NOW = Fired.NOW  # a global for speed, since every hook call sets it


class Point:
    """One site within a port, and when it last fired; `function` is None for a read."""

    __slots__ = ("fired", "function", "key", "path", "site")

    def __init__(self, site: Site, function: Replacement | None) -> None:
        self.site = site
        self.function = function
        self.key = str(site)
        self.path = site.path
        self.fired = Fired.NEVER

    def fires(self, call: int) -> bool:
        """Whether the site addresses this call.

        Raises:
            SiteFiredTooOftenError: this is a second call, and the site names no call.
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
    """The hook on one module's input or output, with its points and its calls so far in this pass.

    Args:
        module: the module.
        values: receives the values read, by address.
        skipped: receives optional sites without a value, address to reason.
        state: the state of the pass.
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
        """Begin a pass; calls counted before it belong to a part that the caller ran alone."""
        for point in self.points:
            if point.fired is NOW:
                point.fired = Fired.APART if self.calls else Fired.EARLIER
        self.calls = 0

    def missed(self) -> list[Point]:
        """Return points that should have fired in this pass; one that fired apart need not if no call came."""
        return [
            point
            for point in self.points
            if point.fired is not NOW and not point.site.optional and (self.calls or point.fired is not Fired.APART)
        ]

    @abstractmethod
    def attach(self) -> RemovableHandle:
        """Register the hook."""

    @abstractmethod
    def path(self, value: Any, point: Point) -> nested.Path:
        """Return the path to a point's tensor in the hook's value."""

    def overlap(self, one: nested.Path, other: nested.Path) -> bool:
        """Whether one path contains the other or equals it."""
        return all(step == also for step, also in zip(one, other, strict=False))

    def fires(self, point: Point, call: int) -> bool:
        """Whether a point addresses this call."""
        return point.fires(call)

    def function(self, point: Point) -> Replacement:
        """Return the function that replaces a point's value at this call."""
        assert point.function is not None
        return point.function

    def pass_through(self, value: Any) -> Any:
        """Read and replace at one call; return the new value, or None if it is unchanged."""
        if recomputing():
            return self._pass_again(value)
        if exported():
            raise TappedModelError("the model is tapped: trace or export it outside the `with hooked.tap(...)` block")
        check_thread(self._pass.thread)
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
        """Repeat the changes to a value that is recomputed during backward."""
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
            # A copy: the model may change it in place, and the function may return the same tensor again.
            return self._put(value, point, new if new is old else copied(new, old))
        raise ReplacementError(
            f"site {point.key}: the replacement is {got}, the value is {list(old.shape)} {old.dtype} "
            f"{old.device}. Return a tensor like the value, for example new.to(value) or "
            "new.expand_as(value).",
            site=point.site,
        )

    def _get(self, value: Any, point: Point) -> Tensor | None:
        """Return the tensor at a point; if an optional site has none, record why and return None."""
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
    "the value is a nested tensor, which has no shape. A torch TransformerEncoder makes them from padded batches in "
    "eval mode: build it with enable_nested_tensor=False, or set encoder.use_nested_tensor = False. In other models "
    "address a value before it is nested, or after torch.nested.to_padded_tensor."
)


def _with_numbers(tensor: Shaped[Tensor, "*shape"], point: Point) -> Shaped[Tensor, "*shape"]:
    if tensor.is_meta:
        raise ModelError(
            f"site {point.key}: the value is on the meta device, so it has a shape but no data. Load the model's "
            "weights first: with from_pretrained, or with model.to_empty(device='cpu') and model.load_state_dict(...).",
            module=point.site.module,
        )
    return tensor


def copied(new: Shaped[Tensor, "*shape"], old: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return a copy with the memory layout of `old`, on which the order of summation, and so the bits, may depend."""
    copy = new.clone()
    if copy.layout is not torch.strided or copy.stride() == old.stride() or _overlaps(old):
        return copy
    return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device).copy_(new)


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements may share memory, as in an expanded tensor."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= last:
                return True
            last += stride * (size - 1)
    return False


def exported() -> bool:
    """Whether the model is being traced or exported, which would keep the hooks for good."""
    exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call] # torch's own
    return tracing or (exporting is not None and exporting())
