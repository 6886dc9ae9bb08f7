"""Trace: the order in which a model's modules compute, and which of them have no side effects."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks.hooks.port import Uncopied
from maskhooks.sites import nested

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_OF_TORCH = set(vars(nn.Module())) - {"_parameters", "_buffers"}


@dataclass(frozen=True)
class Span:
    """One call of a module: when it began and ended, counted in events of the pass."""

    module: nn.Module
    began: int
    ended: int
    pure: bool


@dataclass
class _Open:
    """A call in progress, with what the module and its arguments held when it began."""

    module: nn.Module
    began: int
    arguments: tuple[Any, ...]
    held: list[tuple[Any, Any]]


class Tracer(Uncopied):
    """Hooks every module and records when each call begins and ends, and what it changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.events = 0
        self.open: list[_Open] = []
        self.spans: list[Span] = []
        self.calls: Counter[tuple[int, str]] = Counter()
        self.fired: dict[tuple[int, str, int], int] = {}
        self.outputs: list[tuple[int, Tensor, int, bool]] = []

    def __enter__(self) -> Tracer:
        self.handles: list[RemovableHandle] = []
        self.random = _random_state()
        for module in self.model.modules():
            self.handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._end, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def result(self) -> tuple[list[Span], dict[tuple[int, str, int], int], set[int]]:
        """Return the calls, when each port fired, and the modules whose return values are changed in place later."""
        if self.random != _random_state():
            return [], self.fired, set()
        changed = {key for key, tensor, version, _ in self.outputs if tensor._version != version}
        # If a return value is itself an argument or buffer, a replay would not apply an in-place change to that.
        aliases = {key for key, tensor, version, alias in self.outputs if alias and tensor._version != version}
        spans = [replace(span, pure=span.pure and id(span.module) not in aliases) for span in self.spans]
        return spans, self.fired, changed

    def _tick(self, module: nn.Module, port: str) -> int:
        self.events += 1
        self.fired[id(module), port, self.calls[id(module), port]] = self.events
        self.calls[id(module), port] += 1
        return self.events

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = (args, kwargs)
        held = _held(module, arguments) if module is not self.model else []
        self.open.append(_Open(module, self._tick(module, "input"), arguments, held))

    def _end(self, module: nn.Module, args: object, output: Any) -> None:
        while self.open[-1].module is not module:  # a call that raised and was caught
            self.open.pop()
        call = self.open.pop()
        ended = self._tick(module, "output")
        if module is self.model:  # never skipped
            return
        pure = plain(call.arguments) and plain(output) and _equal(call.held, _held(module, call.arguments))
        self.spans.append(Span(module, call.began, ended, pure))
        storages = {_storage(part) for part, _ in call.held if isinstance(part, Tensor)}
        for _, tensor in nested.tensors(output):
            self.outputs.append((id(module), tensor, tensor._version, _storage(tensor) in storages))


def _held(module: nn.Module, arguments: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """List what a call could write to: its arguments, the module's weights, buffers and attributes.

    Each item has a marker of in-place changes: a tensor's version, a container's length.
    """
    roots: list[Any] = [arguments]
    roots += [value for part in module.modules() for key, value in vars(part).items() if key not in _OF_TORCH]
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    for root in roots:
        _walk(root, found, seen, depth=7)
    return found


def _walk(value: Any, found: list[tuple[Any, Any]], seen: set[int], depth: int) -> None:
    mark: Any = None
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor):
        mark = None if value.is_inference() else value._version
    elif isinstance(value, torch.Generator):
        mark = value.get_state().tolist()
    elif isinstance(value, dict):
        mark, inside = len(value), value.values()
    elif isinstance(value, (list, tuple, set, deque)):
        mark, inside = len(value), value
    elif not isinstance(value, (nn.Module, type, FunctionType, ModuleType)):
        inside = getattr(value, "__dict__", {}).values()
    found.append((value, mark))
    if depth and id(value) not in seen:
        seen.add(id(value))
        for item in list(inside):
            _walk(item, found, seen, depth - 1)


def _equal(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> bool:
    return len(before) == len(after) and all(
        mark == now and (part is other or (isinstance(part, _PLAIN) and part == other))
        for (part, mark), (other, now) in zip(before, after, strict=True)
    )


def _storage(tensor: Tensor) -> int:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage().data_ptr() if strided else id(tensor)


def plain(value: Any) -> bool:
    """Whether a value holds nothing that a module could write to, except tensors and containers."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return True
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(plain, value))
    return False


def _random_state() -> list[Any]:
    """Return the state of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda._initialized else []
    return [state.tolist() for state in [torch.get_rng_state(), *cuda]]
