"""Replay: run a model again from a site onward.

A clean pass records what modules returned before the site fired. While replaying, those modules return the recorded
value instead of computing; everything from the site on computes as always. For a site half way up a stack of layers
the second pass costs half a forward pass.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks import nested
from maskhooks.site import Site

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class _Span:
    """One call of a module: when it began and ended, counted in events of the pass."""

    module: nn.Module
    began: int
    ended: int
    pure: bool


class Replay:
    """Records clean passes of one model and replays them from a site onward.

    What may be skipped is found out in one traced pass, the first time: modules that finished before the site, except
    those that write a buffer or an attribute, or are handed an object they could write to (a key-value cache); these
    compute again. Nothing is skipped in a model that draws random numbers in eval mode.

    Args:
        model: the whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._spans: list[_Span] | None = None
        self._fired: dict[tuple[int, str, int], int] = {}
        self._copied: set[int] = set()

    def trace(self, run: Callable[[], Any]) -> None:
        """Learns the order of computation from one pass; `run` runs the model. Later calls do nothing."""
        if self._spans is None:
            with _Tracer(self.model) as tracer, torch.no_grad():
                run()
            self._spans, self._fired, self._copied = tracer.result()

    @contextlib.contextmanager
    def record(self, site: Site) -> Iterator[Recording]:
        """Records what may be skipped before `site` in the pass that runs inside the `with` (under no_grad).

        `trace` must have run before. Recorded are modules' own returns, before any other library's hook edits them,
        so that an edit is not applied twice when they are replayed.
        """
        recording = Recording()
        handles: list[RemovableHandle] = []
        stop = _Stop(recording, site.call if isinstance(site.call, int) else 0)
        try:
            for module in self._skippable(site):
                keep = _Keep(recording, module, copy=id(module) in self._copied)
                handles.append(module.register_forward_hook(keep, prepend=True))
            module = self.model.get_submodule(site.module)
            if site.port == "input":
                handles.append(module.register_forward_pre_hook(stop))
            else:
                handles.append(module.register_forward_hook(stop))
            yield recording
        finally:
            for handle in handles:
                handle.remove()
        recording.drop_overwritten()

    def _skippable(self, site: Site) -> list[nn.Module]:
        """The outermost modules with a call that ended before the site fired and is free of side effects."""
        module = self.model.get_submodule(site.module)
        call = site.call if isinstance(site.call, int) else 0
        moment = self._fired.get((id(module), site.port, call))
        if self._spans is None or moment is None:
            return []
        before = [span for span in self._spans if span.ended <= moment and span.module is not self.model]
        outermost = [
            span for span in before if span.pure
            and not any(other.pure and other.began < span.began and span.ended < other.ended for other in before)
        ]
        # A module with another call that has side effects, or that runs inside a skipped one, would lose count.
        calls, skipped = (_count(spans) for spans in (before, outermost))
        modules = {id(span.module): span.module for span in outermost}
        return [module for key, module in modules.items() if calls[key] == skipped[key]]


def _count(spans: list[_Span]) -> Counter[int]:
    return Counter(id(span.module) for span in spans)


class Recording:
    """What modules returned in one clean pass before the site fired; `play` skips them."""

    def __init__(self) -> None:
        self.active = True
        self.returns: dict[int, _Returns] = {}
        self._versions: list[tuple[int, Tensor, int]] = []

    def keep(self, module: nn.Module, value: Any, *, copy: bool) -> None:
        returns = self.returns.setdefault(id(module), _Returns(module, copy))
        returns.values.append(_copied(value) if copy else value)
        value = returns.values[-1]
        self._versions += [(id(module), tensor, tensor._version) for _, tensor in nested.tensors(value)]

    def drop_overwritten(self) -> None:
        """Forgets what was changed in place after it was recorded; those modules compute again."""
        for key, tensor, version in self._versions:
            if tensor._version != version:
                self.returns.pop(key, None)
        self._versions.clear()

    @contextlib.contextmanager
    def play(self) -> Iterator[None]:
        """Within the `with`, recorded modules return what they returned, call by call, and compute from then on."""
        missing = object()
        own: list[tuple[nn.Module, Any]] = []
        try:
            for returns in self.returns.values():
                module = returns.module
                own.append((module, module.__dict__.get("forward", missing)))
                module.__dict__["forward"] = _Played(module.forward, returns)
            yield
        finally:
            for module, forward in own:
                if forward is missing:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward


@dataclass
class _Returns:
    """What one module returned, call by call; `copy` where the model changes it in place later."""

    module: nn.Module
    copy: bool
    values: list[Any] = field(default_factory=list)


class _Played:
    def __init__(self, forward: Callable[..., Any], returns: _Returns) -> None:
        self._forward = forward
        self._returns = returns
        self._call = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, self._call = self._call, self._call + 1
        if call >= len(self._returns.values):
            return self._forward(*args, **kwargs)
        value = self._returns.values[call]
        return _copied(value) if self._returns.copy else value


def _copied(value: Any) -> Any:
    for path, tensor in list(nested.tensors(value)):
        value = nested.put(value, path, tensor.clone())
    return value


class _Keep:
    def __init__(self, recording: Recording, module: nn.Module, *, copy: bool) -> None:
        self._recording, self._copy = recording, copy

    def __call__(self, module: nn.Module, args: object, output: Any) -> None:
        if self._recording.active:
            self._recording.keep(module, output, copy=self._copy)


class _Stop:
    """Ends a recording when the site fires."""

    def __init__(self, recording: Recording, call: int) -> None:
        self._recording, self._left = recording, call

    def __call__(self, module: nn.Module, args: object, output: object = None) -> None:
        if self._left == 0:
            self._recording.active = False
        self._left -= 1


class _Tracer:
    """Runs with hooks on every module and notes when each call begins and ends, and what it changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.events = 0
        self.open: list[tuple[nn.Module, int, bool, dict[Any, Any]]] = []
        self.spans: list[_Span] = []
        self.calls: dict[tuple[int, str], int] = {}
        self.fired: dict[tuple[int, str, int], int] = {}
        self.outputs: list[tuple[int, Tensor, int]] = []

    def __enter__(self) -> _Tracer:
        self.handles: list[RemovableHandle] = []
        self.random = _random_state()
        for module in self.model.modules():
            self.handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._end, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def result(self) -> tuple[list[_Span], dict[tuple[int, str, int], int], set[int]]:
        spans = self.spans if torch.equal(self.random, _random_state()) else []
        copied = {key for key, tensor, version in self.outputs if tensor._version != version}
        return spans, self.fired, copied

    def _tick(self, module: nn.Module, port: str) -> int:
        self.events += 1
        call = self.calls.get((id(module), port), 0)
        self.calls[id(module), port] = call + 1
        self.fired[id(module), port, call] = self.events
        return self.events

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.open.append((module, self._tick(module, "input"), _plain((args, kwargs)), _state(module)))

    def _end(self, module: nn.Module, args: object, output: Any) -> None:
        while self.open[-1][0] is not module:  # a call that raised and was caught
            self.open.pop()
        _, began, plain, state = self.open.pop()
        pure = plain and state == _state(module) and all(isinstance(t, Tensor) for _, t in nested.tensors(output))
        self.spans.append(_Span(module, began, self._tick(module, "output"), pure and _plain(output)))
        self.outputs += [(id(module), tensor, tensor._version) for _, tensor in nested.tensors(output)]


def _state(module: nn.Module) -> dict[Any, Any]:
    """Identity and version of every buffer and tensor attribute of a module and those below it."""
    found = {}
    for name, part in module.named_modules():
        held = {**part.__dict__, **part._buffers}
        found.update({(name, key): (id(v), v._version) for key, v in held.items() if isinstance(v, Tensor)})
    return found


def _plain(value: Any) -> bool:
    """Whether a value holds nothing that a module could write to, tensors apart."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return True
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return False


def _random_state() -> Tensor:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += [state.cpu() for state in torch.cuda.get_rng_state_all()]
    return torch.cat(states)
