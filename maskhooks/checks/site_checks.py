"""Site checks by experiment: bypasses, copies, gradients, and why some sites never fire."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.overrides import TorchFunctionMode

from maskhooks.errors import GradientError, UnknownDistributionError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.port import Uncopied
from maskhooks.hooks.preserved import preserved
from maskhooks.hooks.recompute import reentrant
from maskhooks.hooks.replay import forwards
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Positions
from maskhooks.seeds import generator
from maskhooks.sites import nested
from maskhooks.sites.modules import Modules, running
from maskhooks.sites.site import Site

_NOISE = 0.02  # tolerance for half precision, where the order of summation may vary
UNUSED = "no output of the model depends on it, so there is no mask to learn"


def bypassed(hooked: Hooked, batch: Any, sites: Iterable[Site], seed: int = 0) -> dict[Site, bool | None]:
    """Whether information bypasses sites: with every position closed, another input changes the output's bits.

    Gradients cannot see this: a second embedding or a skip connection past the site leaves the gradient at the masked
    value exactly zero. The other input has the same shape and padding (`Task.perturb`).

    Returns:
        For each site whether it is bypassed; None if no other input could be made, or if it changes nothing even with
        open gates.
    """
    with preserved(hooked.model), torch.no_grad(), hooked.expose_sites(()), frozen(hooked.model):
        usual = outputs_of(hooked, batch)  # before `perturb`: a batch that does not fit the model raises its own error
        other = hooked.task.perturb(batch, generator(seed))
        if other is None or _same(usual, outputs_of(hooked, other)):
            return dict.fromkeys(sites)
        found: dict[Site, bool | None] = {}
        for site in sites:
            with hooked.tap(replace={site: _zeros}):
                found[site] = not _same(outputs_of(hooked, batch), outputs_of(hooked, other))
        return found


def differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether the outputs of two passes differ by more than the order of summation explains, as with dropout."""
    return len(first) != len(second) or any(
        a.shape != b.shape or not torch.allclose(a.float(), b.float(), _NOISE, _NOISE, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


def _zeros(value: Tensor) -> Tensor:
    if value.is_quantized:
        zeros = torch.zeros(value.shape, device=value.device)
        return torch.quantize_per_tensor(zeros, value.q_scale(), value.q_zero_point(), value.dtype)
    return torch.zeros_like(value)


def inexact(hooked: Hooked, batch: Any, sites: Iterable[Site]) -> dict[Site, bool]:
    """Whether copying a site's value changes the output's bits, as if it is changed in place by another reference."""
    found: dict[Site, bool] = {}
    with preserved(hooked.model), torch.no_grad(), frozen(hooked.model):
        for site in sites:
            with hooked.tap(read=site):
                usual = outputs_of(hooked, batch)
            with hooked.tap(replace={site: torch.clone}):
                found[site] = not _same(usual, outputs_of(hooked, batch))
    return found


def fused(hooked: Hooked, batch: Any, sites: Sequence[Site]) -> float:
    """Return the largest change of the outputs when hooks on these sites switch off a fused path; 0 if they do not."""
    with preserved(hooked.model), torch.no_grad(), frozen(hooked.model):
        usual = outputs_of(hooked, batch)
        with hooked.tap(read=sites):
            read = outputs_of(hooked, batch)
    return 0.0 if _same(usual, read) else max(float((a - b).abs().max()) for a, b in zip(usual, read, strict=True))


def gradients(hooked: Hooked, batch: Any, sites: Iterable[Site], seed: int = 0) -> dict[Site, str]:
    """Say for each site why no gradient comes back from the outputs; empty if one does, or none can be computed."""
    found: dict[Site, str] = {}
    kept = hooked.expose_sites(())  # so that untapped passes leave nothing behind either
    with preserved(hooked.model), torch.enable_grad(), kept, frozen(hooked.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, on kernels without gradients: reported here per site
        for site in sites:
            found[site] = _no_gradient(hooked, batch, site, seed)
    return found


def _no_gradient(hooked: Hooked, batch: Any, site: Site, seed: int) -> str:
    leaves: list[Tensor] = []
    others: list[Tensor] = []  # not floating point, so without gradients

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            others.append(value)
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    try:
        with hooked.tap(replace={site: leaf}):
            answer = hooked(batch)
            outputs, predicted = nested.tensors(_raw(answer)), _numbers(hooked, answer, batch)
            ends = [t for _, t in outputs if t.is_floating_point() and t.requires_grad and not t.is_nested]
            if leaves and ends:
                source = generator(seed)
                weights = [torch.randn(end.shape, generator=source).to(end) for end in ends]
                try:
                    torch.autograd.backward(ends, weights, inputs=None if reentrant(ends) else leaves)
                except RuntimeError as error:
                    return f"no gradient comes back: {error}"
    except GradientError as error:
        with torch.no_grad(), hooked.tap(replace={site: _zeros}):
            closed = outputs_of(hooked, batch)
        if leaves and _same(closed, outputs_of(hooked, batch)):
            return UNUSED
        return str(error).removeprefix(f"site {site}: ").removesuffix(".")
    except RuntimeError as error:
        if not _refused(hooked, batch, site, leaf):
            raise
        return f"no gradient comes back: {error}"
    if others and not leaves and site.pattern is not None:
        return f"its values are {others[0].dtype}, but masks are learned on floating-point values"
    if leaves and ends and _hard(hooked, batch, site, predicted):
        return "no gradient comes back from the output distribution, as after argmax or detach: build it from logits"
    if not any(leaf.numel() for leaf in leaves):
        return ""  # such as messages of an edge type that the batch lacks
    if not ends or any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves):
        return ""
    return "no gradient comes back: it is zero everywhere, as after a quantised module or one that detaches"


def _refused(hooked: Hooked, batch: Any, site: Site, leaf: Callable[[Tensor], Tensor]) -> bool:
    """Whether the model runs, but not with gradients: some kernels refuse even before backward."""
    with torch.no_grad():
        hooked(batch)
    try:
        with hooked.tap(replace={site: leaf}):
            hooked(batch)
    except RuntimeError:
        return True
    return False


def _hard(hooked: Hooked, batch: Any, site: Site, predicted: list[Tensor]) -> bool:
    """Whether the prediction depends on a site but is detached from it."""
    if any(tensor.requires_grad for tensor in predicted):
        return False
    with hooked.tap(replace={site: _zeros}):
        return not _same(predicted, outputs_of(hooked, batch))


def _raw(outputs: Any) -> Any:
    return list(_parameters(outputs)) if isinstance(outputs, (Distribution, Positions)) else outputs


def silent(hooked: Hooked, batch: Any, sites: Sequence[Site]) -> dict[Site, str]:
    """Say why sites never fire: the module's forward is called directly, its weights are used elsewhere, or neither."""
    known = Modules(hooked.model)
    modules = {site: known[site.module] for site in sites}
    if not modules:
        return {}
    uses = _Uses(modules.values())
    with (
        preserved(hooked.model),
        torch.no_grad(),
        frozen(hooked.model),
        hooked.expose_sites(sites),
        forwards(modules.values()) as calls,
        uses,
    ):
        hooked(batch)
    found: dict[Site, str] = {}
    for site, module in modules.items():
        if calls[id(module)]:
            found[site] = "never fired: its forward is called directly, which skips hooks; call the module itself"
        elif id(module) in uses.seen:
            found[site] = (
                f"never fired: {uses.seen[id(module)]} takes its weights (a fused path); address the module around it"
            )
        else:
            found[site] = "never fired: not used for this batch, or only in compiled code"
    return found


class _Uses(TorchFunctionMode):
    """Records which torch functions take the weights of modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._owners = {id(weight): id(module) for module in modules for weight in module.parameters()}
        self.seen: dict[int, str] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for _, tensor in nested.tensors((args, kwargs or {})):
            if id(tensor) in self._owners and callable(function):
                self.seen.setdefault(self._owners[id(tensor)], getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


def owners(module: nn.Module) -> list[str]:
    """Return the packages of foreign hooks on a module, and of a replaced forward."""
    found = foreign(module)
    found += [vars(module)["forward"]] if "forward" in vars(module) else []
    return sorted({_package(function) for function in found})


def others(model: nn.Module) -> dict[str, int]:
    """Return by package the number of modules with its hooks or its replacement of their forward."""
    return dict(sorted(Counter(package for module in running(model) for package in owners(module)).items()))


def foreign(module: nn.Module) -> list[Any]:
    """Return the hooks on a module that are not from maskhooks."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not isinstance(getattr(hook, "__self__", hook), Uncopied)]


def _package(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if inspect.isfunction(function) else function
    own = inspect.isroutine(function) or inspect.isclass(function)  # an object may carry the name of what it wraps
    name = (getattr(function, "__module__", None) if own else None) or type(function).__module__
    return str(name).partition(".")[0]


def outputs_of(hooked: Hooked, batch: Any) -> list[Tensor]:
    """Run a batch, and return the tensors of the predicted distribution, or of the outputs if it is unknown."""
    return _numbers(hooked, hooked(batch), batch)


def _numbers(hooked: Hooked, outputs: Any, batch: Any) -> list[Tensor]:
    """Return the tensors of the predicted distribution, or of the outputs if it is unknown."""
    try:
        return list(_parameters(hooked.distribution(outputs, batch)))
    except UnknownDistributionError:
        return [part for _, tensor in nested.tensors(outputs) for part in _plain(tensor)]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the same numbers as dense tensors."""
    if tensor.is_nested:
        return list(tensor.unbind())
    return [tensor if tensor.layout is torch.strided else tensor.to_dense()]


def _parameters(outputs: Any) -> Iterable[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (Distribution, Transform)):  # which may stand on others
        for value in vars(outputs).values():
            yield from _parameters(value if not isinstance(value, list) else dict(enumerate(value)))
    elif isinstance(outputs, Positions):
        yield from _parameters(outputs.distribution)
    elif isinstance(outputs, Mapping):
        for part in outputs.values():
            yield from _parameters(part)


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal bit for bit, NaN included."""
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in zip(left, right, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
