"""Replay: run a model again from a site onward.

A clean pass records what modules returned before the site fired. During a replay those modules return the
recorded value instead of computing; everything from the site on computes normally. For a site halfway up a
stack of layers the second pass costs half a forward pass.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from maskhooks.errors import UnknownSiteError, close_matches
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.port import Uncopied
from maskhooks.hooks.recompute import recomputing
from maskhooks.hooks.trace import Span, Tracer, plain
from maskhooks.sites import nested
from maskhooks.sites.modules import Modules
from maskhooks.sites.site import Site

_MISSING = object()


class Replay:
    """Records clean passes of one model and replays them from a site onward.

    One traced pass finds what may be skipped: modules that finished before the site. Modules that write to a
    weight, buffer, attribute or argument, or receive an object they could write to (a key-value cache), compute
    again. Nothing is skipped in a model that draws random numbers in eval mode.

    Args:
        model: the whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._spans: list[Span] | None = None
        self._fired: dict[tuple[int, str, int], int] = {}
        self._copied: set[int] = set()
        self._found: dict[Site, list[nn.Module]] = {}

    def trace(self, run: Callable[[], Any]) -> None:
        """Learn the order of computation from one pass; `run` runs the model. Later calls do nothing."""
        if self._spans is None:
            # Not in inference mode, where tensors have no version to reveal in-place changes.
            with (
                frozen(self.model),
                Tracer(self.model) as tracer,
                torch.inference_mode(False),
                torch.no_grad(),
            ):
                run()
            self._spans, self._fired, self._copied = tracer.result()

    @contextlib.contextmanager
    def record(self, sites: Iterable[Site]) -> Iterator[Recording]:
        """Record what may be skipped before each of `sites` in the one pass run inside, under no_grad.

        Call `trace` first. Modules' own return values are recorded, before another library's hooks edit them,
        so that a replay does not apply an edit twice.

        Raises:
            UnknownSiteError: a site's module is not in the model.
        """
        # Global hooks run before we can record, so nothing is skipped.
        recording = Recording({site: [] if _global_forward_hooks else self._skippable(site) for site in sites})
        handles: list[RemovableHandle] = []
        try:
            for module in recording.modules():
                keep = _Keep(recording, copy=id(module) in self._copied)
                handles.append(module.register_forward_hook(keep, prepend=True, with_kwargs=True))
            for site in recording.skippable:
                module, mark = self._module(site), _Mark(recording, site)
                if site.port == "input":
                    handles.append(module.register_forward_pre_hook(mark))
                else:
                    handles.append(module.register_forward_hook(mark))
            yield recording
        finally:
            for handle in handles:
                handle.remove()
        recording.drop_overwritten()

    def _module(self, site: Site) -> nn.Module:
        modules = Modules(self.model)
        if site.module not in modules:
            known = close_matches(site.module, modules)
            raise UnknownSiteError(f"site {site}: the model has no module {site.module!r}.", site=site, near=known)
        return modules[site.module]

    def _skippable(self, site: Site) -> list[nn.Module]:
        """Return the outermost modules with a call that ended before the site fired and had no side effects."""
        if self._spans is None:
            return []
        if site not in self._found:
            call = site.call if isinstance(site.call, int) else 0
            moment = self._fired.get((id(self._module(site)), site.port, call), 0)
            owner = Modules(self.model).computing(site.module)
            if owner is not self._module(site):  # its places fire only while it is open
                moment = self._fired.get((id(owner), "input", 0), 0)
            self._found[site] = self._outermost(self._spans, moment)
        return self._found[site]

    def _outermost(self, spans: list[Span], moment: int) -> list[nn.Module]:
        before = [span for span in spans if span.ended <= moment and span.module is not self.model]
        pure = [span for span in before if span.pure]
        outermost = [span for span in pure if not any(p.began < span.began and span.ended < p.ended for p in pure)]
        # A module also called with side effects, or inside a skipped one, would lose count of its calls.
        calls, skipped = (_count(spans) for spans in (before, outermost))
        modules = {id(span.module): span.module for span in outermost}
        return [module for key, module in modules.items() if calls[key] == skipped[key]]


def _count(spans: list[Span]) -> Counter[int]:
    return Counter(id(span.module) for span in spans)


class Recording:
    """What modules returned in one clean pass, and when each site fired."""

    def __init__(self, skippable: dict[Site, list[nn.Module]]) -> None:
        self.skippable = skippable
        self.fired: dict[Site, int] = {}
        self.returns: dict[int, _Returns] = {}
        self._kept = 0
        self._refused: set[int] = set()
        self._versions: list[tuple[int, Tensor, int]] = []

    def modules(self) -> list[nn.Module]:
        """The modules that may be skipped, each once."""
        return list({id(module): module for modules in self.skippable.values() for module in modules}.values())

    def keep(self, module: nn.Module, value: Any, *, copy: bool) -> None:
        """Records what a module returned."""
        value = _copied(value) if copy else value
        returns = self.returns.setdefault(id(module), _Returns(copy))
        returns.values.append((self._kept, value))
        self._kept += 1
        self._versions += [(id(module), tensor, tensor._version) for _, tensor in nested.tensors(value)]

    def refuse(self, module: nn.Module) -> None:
        """Leave a module out: it receives an object it could write to, or returns inference tensors."""
        self._refused.add(id(module))

    def mark(self, site: Site) -> None:
        """Notes that a site fired now, after what is recorded so far."""
        self.fired.setdefault(site, self._kept)

    def drop_overwritten(self) -> None:
        """Drop values changed in place after recording; their modules compute again."""
        changed = {key for key, tensor, version in self._versions if tensor._version != version}
        for key in changed | self._refused:
            self.returns.pop(key, None)

    def changed(self, change: Callable[[Any], Any], sites: Iterable[Site] | None = None) -> Recording:
        """Return a recording with `change` applied to its values; only for `sites`, by default all."""
        chosen = list(self.skippable if sites is None else sites)
        other = Recording({site: self.skippable[site] for site in chosen})
        other.fired = {site: self.fired[site] for site in chosen if site in self.fired}
        last = max(other.fired.values(), default=0)
        for module in other.modules():
            if id(module) in self.returns:
                returns = self.returns[id(module)]
                values = [(order, change(value)) for order, value in returns.values if order < last]
                other.returns[id(module)] = _Returns(returns.copy, values)
        return other

    @contextlib.contextmanager
    def play(self, site: Site) -> Iterator[None]:
        """Make modules return what they returned before `site` fired, call by call, then compute."""
        self.drop_overwritten()
        own: list[tuple[nn.Module, Any]] = []
        try:
            for module in self.skippable.get(site, []):
                returns = self.returns.get(id(module), _Returns(copy=False))
                values = [value for order, value in returns.values if order < self.fired.get(site, 0)]
                own.append((module, module.__dict__.get("forward", _MISSING)))
                module.__dict__["forward"] = _Played(module.forward, values, copy=returns.copy)
            yield
        finally:
            for module, forward in own:
                _put_back(module, forward)


@dataclass
class _Returns:
    """What one module returned, each with its number in the recording; `copy` if values are changed in place."""

    copy: bool
    values: list[tuple[int, Any]] = field(default_factory=list)


class _Played(Uncopied):
    """A module's forward that replays its recorded values."""

    def __init__(self, forward: Callable[..., Any], values: list[Any], *, copy: bool) -> None:
        self.__wrapped__ = forward  # for inspect.signature
        self._values, self._copy = values, copy
        self._calls: list[Any] = []  # the arguments of each call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if recomputing():
            call = self._again((args, kwargs))
        else:
            call = len(self._calls)
            self._calls.append((args, kwargs))
        if call >= len(self._values):
            return self.__wrapped__(*args, **kwargs)
        return _copied(self._values[call]) if self._copy else self._values[call]

    def _again(self, arguments: Any) -> int:
        """Return which call is recomputed during backward: the one with the same arguments."""
        found = [call for call, before in enumerate(self._calls) if _equal(before, arguments)]
        return found[0] if len(found) == 1 else len(self._values)


@contextlib.contextmanager
def forwards(modules: Iterable[nn.Module]) -> Iterator[Counter[int]]:
    """Count by module id how often `forward` runs within the `with`, direct calls included."""
    calls: Counter[int] = Counter()
    own = [(module, module.__dict__.get("forward", _MISSING)) for module in {id(m): m for m in modules}.values()]
    try:
        for module, _ in own:
            module.__dict__["forward"] = _Counted(module.forward, calls, id(module))
        yield calls
    finally:
        for module, forward in own:
            _put_back(module, forward)


class ForwardPatch(Uncopied):
    """Replaces a module's forward; adapters subclass it, see `patch_forward`."""

    users = 0
    own: Any = None  # the module's own `forward` attribute

    def __init__(self, module: nn.Module) -> None:
        self.__wrapped__ = module.forward
        self.module = module

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@contextlib.contextmanager
def patch_forward(module: nn.Module, kind: type[ForwardPatch]) -> Iterator[None]:
    """Replace a module's forward by one patch of a kind, until the last such `with` on it ends."""
    there = module.__dict__.get("forward", _MISSING)
    forward = there if isinstance(there, kind) else kind(module)
    if forward is not there:
        forward.own = there
        module.__dict__["forward"] = forward
    forward.users += 1
    try:
        yield
    finally:
        forward.users -= 1
        if not forward.users:
            _put_back(module, forward.own)


def _put_back(module: nn.Module, forward: object) -> None:
    if forward is not _MISSING:
        module.__dict__["forward"] = forward
    else:
        module.__dict__.pop("forward", None)


class _Counted(Uncopied):
    """A module's forward that counts its calls."""

    def __init__(self, forward: Callable[..., Any], calls: Counter[int], key: int) -> None:
        self.__wrapped__ = forward
        self._calls, self._key = calls, key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls[self._key] += 1
        return self.__wrapped__(*args, **kwargs)


def _copied(value: Any) -> Any:
    for path, tensor in list(nested.tensors(value)):
        value = nested.put(value, path, tensor.clone())
    return value


def _equal(one: Any, other: Any) -> bool:
    left, right = (dict(nested.tensors(value)) for value in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[path], right[path]) for path in left)


class _Keep(Uncopied):
    def __init__(self, recording: Recording, *, copy: bool) -> None:
        self._recording, self._copy = recording, copy

    def __call__(self, module: nn.Module, args: object, kwargs: object, output: Any) -> None:
        tracked = not any(tensor.is_inference() for _, tensor in nested.tensors(output))
        if tracked and plain((args, kwargs, output)):
            self._recording.keep(module, output, copy=self._copy)
        else:
            self._recording.refuse(module)


class _Mark(Uncopied):
    """Records when a site fires: modules recorded before that may be skipped for it."""

    def __init__(self, recording: Recording, site: Site) -> None:
        self._recording, self._site = recording, site
        self._left = site.call if isinstance(site.call, int) else 0

    def __call__(self, module: nn.Module, args: object, output: object = None) -> None:
        if self._left == 0:
            self._recording.mark(self._site)
        self._left -= 1
