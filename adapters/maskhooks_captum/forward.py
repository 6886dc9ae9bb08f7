"""Captum's forward function as a model whose inputs, or a layer of which, are sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

import maskhooks
from maskhooks.errors import BatchError, SettingError
from maskhooks.model.hooked import Hooked
from maskhooks.sites.pattern import Pattern, suggestion
from maskhooks.sites.site import Site

Function = Callable[..., Any]


class ForwardModule(nn.Module):
    """A forward function; its inputs pass through `inputs.0`, `inputs.1` and so on.

    Integers pass as floating-point numbers and are rounded after that; with baselines, inputs pass as the difference.

    Args:
        function: the forward function.
        model: the model that it runs, which is in eval mode with frozen weights meanwhile; None if it runs none.
        layer: a layer of the model that is a site.
        inputs: number of inputs.
        baselines: whether as many baselines follow them.
        extra: number of further arguments.
    """

    def __init__(
        self,
        function: Function,
        model: nn.Module | None,
        layer: nn.Module | None,
        inputs: int,
        baselines: bool,
        extra: int,
    ) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.inputs = nn.ModuleList(nn.Identity() for _ in range(inputs))
        self.function, self.baselines, self.extra = function, baselines, extra

    def forward(self, *given: Any) -> Any:
        """Return what the function returns for the inputs and the further arguments."""
        count = len(self.inputs)
        bases = given[count : 2 * count] if self.baselines else [None] * count
        begin = 2 * count if self.baselines else count
        inputs = [_through(*one) for one in zip(self.inputs, given[:count], bases, strict=True)]
        return self.function(*inputs, *given[begin : begin + self.extra])


def model_of(function: Function, model: nn.Module | None) -> nn.Module:
    """Return the model that a forward function runs.

    Raises:
        SettingError: it is not known.
    """
    found = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    model = found if model is None and isinstance(found, nn.Module) else model
    if model is None:
        raise SettingError(
            "the forward function is not a module, so its weights could not be frozen while masks are learned. Name "
            "the model that it runs, model=..., or torch.nn.Identity() if it runs none"
        )
    return model


def hooked_at(module: ForwardModule, sites: Sequence[Site], options: Mapping[str, Any]) -> Hooked:
    """Wrap a forward function with sites; `options` are what else `maskhooks.wrap` takes."""
    return maskhooks.wrap(module, sites=sites, **{"output": distribution, **options})


def site_at(address: str, value: Shaped[Tensor, "..."], pattern: str | Pattern | None) -> Site:
    """Return a site for a value; without a pattern with the usual one of its number of axes."""
    return Site.parse(address, pattern or suggestion(value.dim()))


def distribution(outputs: Any) -> Distribution:
    """Return classes for outputs `(batch, class)`, and for numbers `(batch,)` normal ones of unit variance.

    Raises:
        BatchError: the outputs are neither.
    """
    if isinstance(outputs, Tensor) and outputs.dim() in (1, 2):
        one = outputs.dim() == 1 or outputs.shape[1] == 1
        return Normal(outputs.flatten(), 1.0) if one else Categorical(logits=outputs)
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise BatchError(
        f"the forward function returns {shape}, not a tensor (batch,) or (batch, class). Return one, or say what the "
        "output means: output=lambda outputs: ..."
    )


def of_target(outputs: Float[Tensor, "batch cls"], target: Int[Tensor, " batch"]) -> Distribution:
    """Return whether the class is the target, as a distribution."""
    own = outputs.gather(1, target[:, None]).squeeze(1)
    rest = outputs.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    return Bernoulli(logits=own - rest)


def targets(target: Any, count: int, device: torch.device) -> Int[Tensor, " batch"]:
    """Return Captum's target as a class per example.

    Raises:
        SettingError: it names several axes of the output.
        BatchError: it has another length.
    """
    found = torch.as_tensor(target, device=device) if not isinstance(target, tuple) else torch.zeros(1, 1)
    if found.is_floating_point() or found.dim() > 1:
        raise SettingError(
            f"target={target!r} is not a class, or a class per example. Let the forward function return (batch, class)"
        )
    found = found.flatten()
    if len(found) not in (1, count):
        raise BatchError(f"there are targets for {len(found)} examples, but the batch has {count}. Give one for each")
    return found.expand(count)


def _through(gate: nn.Module, value: Tensor, base: Tensor | None) -> Tensor:
    wide = value if value.is_floating_point() else value.double()
    found: Tensor = gate(wide) if base is None else gate(wide - base) + base
    return found.to(value.dtype) if value.is_floating_point() else found.round().to(value.dtype)
