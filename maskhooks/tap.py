"""Tap: read and replace values at sites of a model for the length of one `with`."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks import nested
from maskhooks.errors import (
    CompiledModelError,
    NotATensorError,
    ReplacementError,
    SiteConflictError,
    SiteFiredTooOftenError,
    SiteNeverFiredError,
    TappedModelError,
    UnfiredSiteWarning,
    UnknownSiteError,
    near,
)
from maskhooks.site import Site

Replacement = Callable[[Tensor], Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Values(dict[str, Tensor]):
    """Values by address; a `Site` serves as a key too, and an unknown key lists the near ones."""

    def __getitem__(self, key: str | Site) -> Tensor:
        return super().__getitem__(str(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(str(key))

    def __missing__(self, key: str) -> NoReturn:
        raise UnknownSiteError(f"no value was read at {key!r}.", site=key, near=near(key, self) or list(self)[:5])


class Tap:
    """Reads and replaces values at sites while its `with` lasts; afterwards the model is as it was, bit for bit.

    Meanwhile the model is in eval mode with frozen weights. Values belong to the latest forward pass of the model. A
    site that is both read and replaced gives its value before the replacement. Taps nest: the inner one sees what the
    outer one put in place.

    Args:
        model: the whole model, whose forward pass counts the calls of its modules.
        read: sites to read.
        replace: for each site a function from its value to one of the same shape, dtype and device.

    Attributes:
        values: `Values`, address to tensor. Without grad mode a copy, so that later in-place changes do not reach it;
            with grad mode the tensor itself, on the path of the gradient.
        outputs: what the model returned.
        skipped: address to reason, for optional sites that gave no value.

    Raises:
        UnknownSiteError: a site's module is not in the model.
        SiteConflictError: two replacements of one value.
        CompiledModelError: hooks added now would be ignored.

    While the model runs:
        SiteFiredTooOftenError, SiteNeverFiredError, NotATensorError, ReplacementError.
    """

    def __init__(
        self, model: nn.Module, read: Iterable[Site] = (), replace: Mapping[Site, Replacement] | None = None
    ) -> None:
        self.model = model
        self.values = Values()
        self.outputs: Any = None
        self.skipped: dict[str, str] = {}
        self._ports: dict[tuple[int, str], _Port] = {}
        self._handles: list[RemovableHandle] = []
        self._frozen: contextlib.AbstractContextManager[None] | None = None
        self._depth = self._runs = 0
        self._modules = dict(model.named_modules(remove_duplicate=False))
        for site in {str(site): site for site in read}.values():
            self._add(site, None)
        for site, function in (replace or {}).items():
            self._add(site, function)
        self._check_compiled()

    def __enter__(self) -> Tap:
        if self._handles:
            raise SiteConflictError("this tap is open already; a tap is entered once at a time")
        self._depth = self._runs = 0
        self.values.clear()
        self.skipped.clear()
        for point in self._points():
            point.ever = False
        self._frozen = frozen(self.model)
        self._frozen.__enter__()
        try:
            self._handles.append(self.model.register_forward_pre_hook(_Begin(self)))
            for port in self._ports.values():
                if isinstance(port.hook, _OnInput):
                    handle = port.module.register_forward_pre_hook(port.hook, with_kwargs=True)
                else:
                    handle = port.module.register_forward_hook(port.hook)
                self._handles.append(handle)
            self._handles.append(self.model.register_forward_hook(_End(self), always_call=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._remove()
        if kind is None:
            self._check_fired(ever=True)

    def _remove(self) -> None:
        try:
            while self._handles:
                self._handles.pop().remove()
        finally:
            held, self._frozen = self._frozen, None
            if held is not None:
                held.__exit__(None, None, None)

    def _points(self) -> list[_Point]:
        return [point for port in self._ports.values() for point in port.points]

    def _add(self, site: Site, function: Replacement | None) -> None:
        module = self._modules.get(site.module)
        if module is None:
            raise UnknownSiteError(
                f"site {site}: the model has no module {site.module!r}.",
                site=site,
                near=near(site.module, self._modules),
            )
        port = self._ports.setdefault((id(module), site.port), _Port(self, module, site.port))
        if function is None:
            port.reads.append(_Point(site, None))
            return
        for other in (point.site for point in port.replaces):
            shorter = min(len(site.path), len(other.path))
            if site.path[:shorter] == other.path[:shorter] and (
                site.call == other.call or None in (site.call, other.call) or "*" in (site.call, other.call)
            ):
                raise SiteConflictError(
                    f"two replacements of one value: {other} and {site}. Combine the two functions, or nest two "
                    f"taps: the inner one sees the outer one's value.",
                    site=site,
                )
        port.replaces.append(_Point(site, function))

    def _check_compiled(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        optimized: tuple[type, ...] = (dynamo.OptimizedModule,) if dynamo else ()
        for port in self._ports.values():
            for site in (point.site for point in port.points):
                steps = site.module.split(".") if site.module else []
                for end in range(len(steps) + 1):
                    name = ".".join(steps[:end])
                    module = self._modules[name]
                    if isinstance(module, (*optimized, torch.jit.ScriptModule)) or (
                        getattr(module, "_compiled_call_impl", None) is not None
                    ):
                        what = f"module {name!r}" if name else "the model"
                        raise CompiledModelError(
                            f"site {site}: {what} is compiled or scripted, and hooks added now would be ignored. "
                            f"Wrap the model before compiling it; torch.compile keeps it as `compiled._orig_mod`.",
                            module=name,
                        )

    # What happens during a forward pass

    def _begin(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self.values.clear()
            for port in self._ports.values():
                port.calls = 0
                for point in port.points:
                    point.now = False

    def _end(self, outputs: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and outputs is not None:  # None: the model raised
            self._runs += 1
            self.outputs = outputs
            self._check_fired(ever=False)

    def _check_fired(self, *, ever: bool) -> None:
        """After a pass: exactly named sites fired. At the end: so they did without any pass of the whole model."""
        if ever:
            self._check_optional()
        if ever and self._runs:
            return
        missing = {
            point.site: port for port in self._ports.values() for point in port.points
            if not point.site.optional and not (point.ever if ever else point.now)
        }
        if missing:
            site, port = next(iter(missing.items()))
            names = ", ".join(str(site) for site in missing)
            calls = "did not run" if not port.calls else f"ran {port.calls} time(s), so its last call is @{port.calls - 1}"
            raise SiteNeverFiredError(
                f"never fired: {names}. Module {site.module!r} {calls}. It may be unused for this input, called as "
                f"module.forward(...), or bypassed by a fused path; `maskhooks doctor` shows which sites fire. "
                f"Mark a site optional=True if it need not fire.",
                sites=list(missing),
            )

    def _check_optional(self) -> None:
        optional = [point for point in self._points() if point.site.optional]
        silent = [point.key for point in optional if not point.ever]
        given = [point for point in optional if point.ever and point.key not in self.skipped]
        if optional and not given:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in list(self.skipped.items())[:3])
            raise SiteNeverFiredError(
                f"none of the {len(optional)} optional sites gave a value, "
                f"the first of them {optional[0].key}{' (' + reasons + ')' if reasons else ''}. "
                f"Was the model run inside the `with`? `maskhooks doctor` shows which sites fire.",
                sites=[point.site for point in optional],
            )
        if silent:
            self.skipped.update(dict.fromkeys(silent, "never fired"))
            names = ", ".join(silent[:5]) + (", ..." if len(silent) > 5 else "")
            warnings.warn(f"{len(silent)} optional sites never fired: {names}", UnfiredSiteWarning, stacklevel=4)


class _Point:
    """One site within a port, with what happened there; `function` is None for a read."""

    __slots__ = ("ever", "function", "key", "now", "path", "site")

    def __init__(self, site: Site, function: Replacement | None) -> None:
        self.site = site
        self.function = function
        self.key = str(site)
        self.path = site.path
        self.now = self.ever = False

    def fires(self, call: int) -> bool:
        wanted = self.site.call
        if wanted is None and call:
            site, path = self.site, nested.format_path(self.path)
            raise SiteFiredTooOftenError(
                f"site {site}: module {site.module!r} ran more than once in one forward pass. Address one call as "
                f"'{site.at(0)}' (from 0), or every call as '{site.module}@*:{site.port}{path}'.",
                site=site,
            )
        if wanted is None or wanted == "*" or wanted == call:
            self.now = self.ever = True
            return True
        return False


class _Port:
    """One module's input or output: the points there, and the calls so far in this pass."""

    def __init__(self, tap: Tap, module: nn.Module, side: str) -> None:
        self.tap = tap
        self.module = module
        self.reads: list[_Point] = []
        self.replaces: list[_Point] = []
        self.calls = 0
        self.hook = _OnInput(self) if side == "input" else _OnOutput(self)

    @property
    def points(self) -> list[_Point]:
        return [*self.reads, *self.replaces]

    def pass_through(self, value: Any, get: Callable[[Any, _Point], Any], put: Callable[..., Any]) -> Any:
        """Reads and replaces at one call; returns the value to go on with, or None where it is unchanged."""
        call, changed = self.calls, False
        self.calls += 1
        grad = torch.is_grad_enabled()
        originals = [(point, get(value, point)) for point in self.replaces if point.fires(call)]
        for point in self.reads:
            if not point.fires(call):
                continue
            tensor = get(value, point)
            if not isinstance(tensor, Tensor):
                self._not_a_tensor(tensor, point)
                continue
            key = f"{point.site.at(call)}" if point.site.call == "*" else point.key
            if grad and tensor.requires_grad:
                self.tap.values[key] = tensor
                value, changed = put(value, point, tensor.clone()), True
            else:
                self.tap.values[key] = tensor.clone()
        for point, tensor in originals:
            if not isinstance(tensor, Tensor):
                self._not_a_tensor(tensor, point)
                continue
            value, changed = put(value, point, self._replaced(tensor, point)), True
        return value if changed else None

    def _not_a_tensor(self, value: Any, point: _Point) -> None:
        missing = isinstance(value, nested.PathError)
        what = str(value) if missing else f"the value is {nested.describe(value)}"
        if point.site.optional:
            self.tap.skipped[point.key] = what
            return
        inside = [] if missing else [f"'{point.key}{nested.format_path(path)}'" for path, _ in nested.tensors(value)]
        way_out = f"Address one of {', '.join(inside[:5])}." if inside else "Address another part of the value."
        raise NotATensorError(f"site {point.key}: no tensor there; {what}. {way_out}", site=point.site)

    def _replaced(self, old: Tensor, point: _Point) -> Tensor:
        assert point.function is not None
        new: Any = point.function(old)
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            got = f"{list(new.shape)} {new.dtype} {new.device}" if isinstance(new, Tensor) else nested.describe(new)
            raise ReplacementError(
                f"site {point.key}: the replacement is {got}, the value is {list(old.shape)} {old.dtype} "
                f"{old.device}. Return a tensor like the value, for example new.to(value) or new.expand_as(value).",
                site=point.site,
            )
        return new


class _Hook:
    """A hook of ours. Copies of a tapped model would keep it for good, so copying one raises."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TappedModelError("the model is tapped: copy it outside the `with hooked.tap(...)` block")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TappedModelError("the model is tapped: pickle or save it outside the `with hooked.tap(...)` block")


class _Begin(_Hook):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: object) -> None:
        self.tap._begin()


class _End(_Hook):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: object, outputs: Any) -> None:
        self.tap._end(outputs)


class _OnOutput(_Hook):
    def __init__(self, port: _Port) -> None:
        self.port = port

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        return self.port.pass_through(output, self.get, self.put)

    @staticmethod
    def get(output: Any, point: _Point) -> Any:
        return _get(output, point.path) if point.path else output

    @staticmethod
    def put(output: Any, point: _Point, new: Tensor) -> Any:
        return nested.put(output, point.path, new)


class _OnInput(_Hook):
    def __init__(self, port: _Port) -> None:
        self.port = port

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.port.pass_through((args, kwargs), self.get, self.put)

    def get(self, arguments: Arguments, point: _Point) -> Any:
        try:
            return _get(arguments, (*self.locate(arguments, point), *point.path[1:]))
        except nested.PathError as error:
            return error

    def put(self, arguments: Arguments, point: _Point, new: Tensor) -> Any:
        return nested.put(arguments, (*self.locate(arguments, point), *point.path[1:]), new)

    def locate(self, arguments: Arguments, point: _Point) -> nested.Path:
        """Where an argument named by position or by name was passed: (0, position) or (1, name)."""
        args, kwargs = arguments
        wanted = point.path[0] if point.path else 0
        if isinstance(wanted, int) and wanted < len(args):
            return (0, wanted)
        if isinstance(wanted, str) and wanted in kwargs:
            return (1, wanted)
        names = list(inspect.signature(self.port.module.forward).parameters)
        if isinstance(wanted, int) and wanted < len(names) and names[wanted] in kwargs:
            return (1, names[wanted])
        if isinstance(wanted, str) and wanted in names[: len(args)]:
            return (0, names.index(wanted))
        given = [f"[{index}]" for index in range(len(args))] + [f".{name}" for name in kwargs]
        raise nested.PathError(f"no argument {nested.format_path((wanted,))} in this call, which has {', '.join(given) or 'none'}")


def _get(value: Any, path: nested.Path) -> Any:
    try:
        return nested.get(value, path)
    except nested.PathError as error:
        return error


_holds: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen weights for the length of a `with`; flags are set directly and restored one by one.

    Several may be open on one model, and may close in any order: the last one restores.
    """
    hold = _holds.get(model)
    if hold is None:
        training = [module for module in model.modules() if module.training]
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        hold = _holds[model] = [0, training, weights]
        for module in training:
            module.training = False
        for weight in weights:
            weight.requires_grad_(False)
    hold[0] += 1
    try:
        yield
    finally:
        hold[0] -= 1
        if not hold[0]:
            del _holds[model]
            for module in hold[1]:
                module.training = True
            for weight in hold[2]:
                weight.requires_grad_(True)
