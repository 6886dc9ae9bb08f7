"""Tap: read and replace values at sites of a model within a `with`."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from maskhooks.errors import (
    GradientError,
    SiteConflictError,
    SiteNeverFiredError,
    TappedModelError,
    UnfiredSiteWarning,
    UnknownSiteError,
    close_matches,
)
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.module_ports import InputPort, OutputPort
from maskhooks.hooks.port import Fired, Point, Port, Replacement, Uncopied
from maskhooks.hooks.recompute import Pass, Watch, recomputing
from maskhooks.hooks.several_parts import Parts, PartsPort, PicksPort
from maskhooks.hooks.threads import check_thread, is_other
from maskhooks.hooks.time_steps import Steps, StepsPort
from maskhooks.sites import nested
from maskhooks.sites.modules import Modules, check_compiled, compiled
from maskhooks.sites.site import Site


class Values(dict[str, Tensor]):
    """Values by address; a `Site` works as a key too, and an unknown key lists similar ones."""

    def __getitem__(self, key: str | Site) -> Tensor:
        return super().__getitem__(str(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(str(key))

    def get(self, key: str | Site, default: Any = None) -> Any:
        return super().get(str(key), default)

    def __missing__(self, key: str) -> NoReturn:
        known = close_matches(key, self) or list(self)[:5]
        raise UnknownSiteError(f"no value was read at {key!r}.", site=key, near=known)


class Tap:
    """Reads and replaces values at sites within a `with`, then restores the model bit for bit, even after an error.

    Meanwhile the model is in eval mode with frozen weights. Values belong to the latest forward pass of the
    model; a part that the caller ran alone before it (an encoder, for which `generate` then runs the decoder step
    by step) keeps its value and need not fire again. A site that is both read and replaced returns its value
    before the replacement. Taps nest: the inner one sees the outer one's replacement.

    Args:
        model: the whole model, whose forward pass counts the calls of its modules.
        read: sites to read.
        replace: for each site a function from its value to one of the same shape, dtype and device.

    Attributes:
        values: `Values`, address to tensor: a copy, so that later in-place changes do not reach it. A tensor
            that requires grad is the original, on the gradient's path, and the model continues with a copy.
        outputs: what the model returned.
        skipped: address to reason, for optional sites without a value.

    Raises:
        UnknownSiteError: a site's module is not in the model.
        SiteConflictError: two replacements of one value.
        CompiledModelError: hooks added now would be ignored.
        TappedModelError: on entering, another thread taps or explains the model.

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
        self._ports: dict[tuple[int, str], Port] = {}
        self._handles: list[RemovableHandle] = []
        self._frozen: contextlib.AbstractContextManager[bool] | None = None
        self._pass = Pass()
        self._watch = Watch(model, self._pass)
        self._handling: BaseException | None = None  # the exception the caller is handling, if any
        self._depth = self._runs = 0
        self._watched = True  # or no watch is needed, since closing the tap leaves weights frozen
        self._within: dict[str, Tensor] = {}  # the values of the latest pass
        self._apart: dict[str, Tensor] = {}  # those read before it, from parts that the caller ran alone
        self._modules = Modules(model)
        for site in {str(site): site for site in read}.values():
            self._add(site, None)
        for site, function in (replace or {}).items():
            self._add(site, function)
        passed: set[str] = set()
        if isinstance(model, torch.jit.ScriptModule):  # it takes no hooks
            check_compiled(None, "", self._modules)
        for site in {point.site.module: point.site for point in self._points()}.values():
            check_compiled(site, site.module, self._modules, passed)

    def __enter__(self) -> Tap:
        if self._handles:
            raise SiteConflictError("this tap is already open. Close it before entering it again")
        self._depth = self._runs = 0
        for values in (self.values, self._within, self._apart):
            values.clear()
        self.skipped.clear()
        for port in self._ports.values():
            port.calls = 0
        for point in self._points():
            point.fired = Fired.NEVER
        try:
            held = frozen(self.model)
            self._watched, self._frozen, self._pass.thread = not held.__enter__(), held, get_ident()
            self._watch.open = True
            self._handles.append(self.model.register_forward_pre_hook(_Begin(self)))
            for port in self._ports.values():
                self._handles.append(port.attach())
            self._handles.append(self.model.register_forward_hook(_End(self), always_call=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        lost = not all(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)
        self._remove()
        if kind is None and lost:
            raise TappedModelError(
                "the tap's hooks are gone: another library removed them inside the `with` (pyvene removes all hooks of "
                "a model), so later passes were neither read nor changed. Let it finish before the tap opens."
            )
        if kind is None:
            self._check_optional()
            if not self._runs:
                self._check_named()

    def _remove(self) -> None:
        try:
            while self._handles:
                self._handles.pop().remove()
        finally:
            self._watch.open = False
            held, self._frozen = self._frozen, None
            self._pass.thread = None
            if held is not None:
                held.__exit__(None, None, None)

    def _points(self) -> list[Point]:
        return [point for port in self._ports.values() for point in port.points]

    def _add(self, site: Site, function: Replacement | None) -> None:
        module = self._modules.get(site.module)
        if module is None:
            check_compiled(site, site.module, self._modules)
            raise UnknownSiteError(
                f"site {site}: the model has no module {site.module!r}.",
                site=site,
                near=close_matches(site.module, self._modules),
            )
        kind = _input(module) if site.port == "input" else _output(module)
        port = self._ports.setdefault((id(module), site.port), kind(module, self.values, self.skipped, self._pass))
        if function is None:
            port.add(Point(site, None))
            return
        for other in (point.site for point in port.replaces):
            calls = (site.call, other.call)
            if port.overlap(site.path, other.path) and (calls[0] == calls[1] or None in calls or "*" in calls):
                raise SiteConflictError(
                    f"two replacements of one value: {other} and {site}. Combine the two functions, or nest "
                    f"two taps: the inner one sees the outer one's value.",
                    site=site,
                )
        port.add(Point(site, function))

    # During a forward pass

    def _begin(self) -> None:
        if recomputing():
            return
        check_thread(self._pass.thread)
        self._depth += 1
        if self._depth == 1:
            self._pass.begin()
            if self._pass.grad and not self._watched:
                self._watched = True
                if not any(map(compiled, self._modules.values())):  # PyTorch warns of global hooks there
                    self._handles.append(register_module_forward_pre_hook(self._watch))
            self._handling = sys.exc_info()[1]
            self._apart = {key: value for key, value in self.values.items() if self._within.get(key) is not value}
            self.values.clear()
            self.values.update(self._apart)
            for port in self._ports.values():
                port.begin()

    def _end(self, outputs: Any) -> None:
        if self._depth == 0 or recomputing():  # another library's hook raised before the pass began
            return
        if is_other(self._pass.thread):  # a pass that began before the tap
            return
        self._depth -= 1
        raised = sys.exc_info()[1] is not self._handling
        if self._depth:
            return
        try:
            if not raised:
                self._ended(outputs)
        finally:
            self._within = {key: value for key, value in self.values.items() if self._apart.get(key) is not value}
            for port in self._ports.values():
                port.calls = 0  # what runs from here on is not part of a pass

    def _ended(self, outputs: Any) -> None:
        self._runs += 1
        self.outputs = outputs
        self._check_pass()
        if self._pass.grad:
            self._check_gradient([tensor for _, tensor in nested.tensors(outputs)])

    def _check_gradient(self, outputs: list[Tensor]) -> None:
        """After a pass, check that gradients can reach the replacements, and are not computed too late."""
        self._watch.guard(outputs, self.values.values())
        learning = self._pass.learning
        if learning and outputs and not any(tensor.requires_grad for tensor in (*outputs, *self.values.values())):
            raise GradientError(
                f"site {learning[0]}: its replacement requires grad, but no output of the model does, so no gradient "
                "would come back. A later module runs under torch.no_grad(), detaches, or has no gradients, such as a "
                "quantised one. If you need no gradient, run the model under torch.no_grad().",
                site=learning[0],
            )

    def _check_pass(self) -> None:
        """After a pass, check that exactly named sites fired in it."""
        missed = {point.site: port for port in self._ports.values() for point in port.missed()}
        if missed:
            raise _never_fired(missed)

    def _check_named(self) -> None:
        """On exit without a whole pass, check that exactly named sites fired."""
        named = [(point, port) for port in self._ports.values() for point in port.points if not point.site.optional]
        silent = {point.site: port for point, port in named if point.fired is Fired.NEVER}
        if silent:
            raise _never_fired(silent)

    def _check_optional(self) -> None:
        optional = [point for point in self._points() if point.site.optional]
        silent = [point.key for point in optional if point.fired is Fired.NEVER]
        fired = [point for point in optional if point.fired is not Fired.NEVER and point.key not in self.skipped]
        if optional and not fired:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in list(self.skipped.items())[:3])
            raise SiteNeverFiredError(
                f"none of the {len(optional)} optional sites had a value; "
                f"the first is {optional[0].key}{' (' + reasons + ')' if reasons else ''}. "
                f"Was the model run inside the `with`? `maskhooks doctor` shows which sites fire.",
                sites=[point.site for point in optional],
            )
        if silent:
            self.skipped.update(dict.fromkeys(silent, "never fired"))
            names = ", ".join(silent[:5]) + (", ..." if len(silent) > 5 else "")
            message = f"{len(silent)} optional sites never fired: {names}"
            warnings.warn(message, UnfiredSiteWarning, stacklevel=3)


def _never_fired(missing: Mapping[Site, Port]) -> SiteNeverFiredError:
    site, port = next(iter(missing.items()))
    names = ", ".join(map(str, missing))
    calls = f"ran {port.calls} time(s), its last call is @{port.calls - 1}" if port.calls else "did not run"
    return SiteNeverFiredError(
        f"never fired: {names}. Module {site.module!r} {calls}. It may be unused for this input, "
        "called as module.forward(...), compiled before it was tapped, or bypassed by a fused path; "
        "`maskhooks doctor` shows which sites fire. Mark a site optional=True if it need not fire.",
        sites=list(missing),
    )


def _input(module: nn.Module) -> type[Port]:
    return PicksPort if isinstance(module, Parts) and module.apart else InputPort


def _output(module: nn.Module) -> type[Port]:
    if isinstance(module, Steps):
        return StepsPort
    return PartsPort if isinstance(module, Parts) else OutputPort


class _Begin(Uncopied):
    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    def __call__(self, module: nn.Module, args: object) -> None:
        self._tap._begin()


class _End(Uncopied):
    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    def __call__(self, module: nn.Module, args: object, outputs: Any) -> None:
        self._tap._end(outputs)
