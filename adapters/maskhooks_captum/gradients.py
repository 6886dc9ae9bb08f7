"""Captum's methods that use gradients, as explainers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.settings.types import Count, Seed
from maskhooks.sites import nested
from maskhooks.sites.site import Selector
from maskhooks_captum.at_site import AtSite
from maskhooks_captum.explained import Output, Target
from maskhooks_captum.explainer import CaptumExplainer, Value, library

Rule = Literal["gausslegendre", "riemann_trapezoid", "riemann_left", "riemann_right", "riemann_middle"]

_TOLERANCE, _ROUNDING = 1e-3, 1e-5  # of the sum of absolute attributions, and of the output


class IntegratedGradients(CaptumExplainer):
    """Integrated gradients (Sundararajan et al. 2017), by Captum's `IntegratedGradients`.

    (x - b) times the mean gradient on the straight path from the baseline b to the value x. Over a whole example the
    scores sum to the difference of the output at x and at b, up to the error of the sum over steps.

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.
        n_steps: points on the path.
        method: the rule that integrates over them.
        internal_batch_size: rows in one pass of the model, at least the batch's; None for all steps at once.
    """

    name = "integrated-gradients"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        baseline: BaselineSetting | Value = "zero",
        n_steps: Count = 50,
        method: Rule = "gausslegendre",
        internal_batch_size: Count | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, target=target, output=output, baseline=baseline, seed=seed)
        self.n_steps, self.method, self.internal_batch_size = n_steps, method, internal_batch_size

    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        rows, size = at.rows, self.internal_batch_size
        found = (
            library(self.name)
            .IntegratedGradients(at)
            .attribute(
                at.layout.value,
                self.baseline_of(at),
                additional_forward_args=(rows,),
                n_steps=self.n_steps,
                method=self.method,
                internal_batch_size=None if size is None else max(size, len(rows)),
            )
        )
        return at.layout.summed(found)


class InputXGradient(CaptumExplainer):
    """Gradient times value, by Captum's `InputXGradient`: the first-order effect of scaling a position to zero.

    Args:
        hooked, sites, target, output, seed: as `CaptumExplainer` takes them.
    """

    name = "input-x-gradient"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        target: Target = None,
        output: Output | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, target=target, output=output, seed=seed)

    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        value = at.layout.value.clone().requires_grad_()
        found = library(self.name).InputXGradient(at).attribute(value, additional_forward_args=(at.rows,))
        return at.layout.summed(found)


class DeepLift(CaptumExplainer):
    """DeepLift (Shrikumar et al. 2017; its Rescale rule), by Captum's `DeepLift`.

    Its rules cover layers that are modules, each used once: ReLU, ELU, LeakyReLU, sigmoid, tanh, softplus, softmax and
    max pooling, with linear maps between. For all else Captum silently takes plain gradients. Scores of an example must
    sum to the difference of the output at the value and at the baseline; where they do not, this is an error.

    Args:
        hooked, sites, target, output, baseline, seed: as `CaptumExplainer` takes them.

    While explaining:
        SettingError: the model after a site has what the rules do not cover.
    """

    name = "deep-lift"

    def attributed(self, at: AtSite) -> Float[Tensor, "*gated"]:
        if at.layout.whole:
            raise SettingError(
                f"deep-lift does not apply at {at.layout.site}: it needs the batch axis first, and these rows belong "
                "to examples by an index. Use integrated-gradients"
            )
        value, baseline, rows = at.layout.value.clone().requires_grad_(), self.baseline_of(at), at.rows
        onward = _Onward(at, value)
        with _attributes_restored(onward):
            try:
                found = library(self.name).DeepLift(onward).attribute(value, baseline, additional_forward_args=(rows,))
            except (AssertionError, RuntimeError) as error:
                if "DeepLift" not in str(error) and not isinstance(error, AssertionError):
                    raise
                raise SettingError(_refusal(at, f"Captum says: {' '.join(str(error).split())}")) from error
        with torch.no_grad():
            full, empty = at(value, rows), at(baseline, rows)
        parts, moved = found.detach().flatten(1), full - empty
        missing = (parts.sum(1) - moved).abs()
        allowed = _TOLERANCE * parts.abs().sum(1) + _ROUNDING * (full.abs() + empty.abs())
        if bool((missing > allowed).any()):
            worst = int((missing - allowed).argmax())
            raise SettingError(
                _refusal(at, f"scores sum to {float(parts[worst].sum()):.4g}, the output moves by {moved[worst]:.4g}")
            )
        return at.layout.summed(found)


class _Onward(nn.Module):
    """The module that DeepLift takes; its parts are those whose inputs depend on the site, as it fails at others."""

    def __init__(self, at: AtSite, value: Tensor) -> None:
        super().__init__()
        self.at, found = at, list[nn.Module]()

        def note(module: nn.Module, args: Any) -> None:
            if any(tensor.requires_grad for _, tensor in nested.tensors(args)):
                found.append(module)

        leaves = [module for module in at.model.modules() if not any(module.children())]
        handles = [module.register_forward_pre_hook(note) for module in leaves]
        try:
            at(value, at.rows)
        finally:
            for handle in handles:
                handle.remove()
        self.parts = nn.ModuleList(dict.fromkeys(found))

    def forward(self, value: Tensor, rows: Tensor) -> Tensor:
        return self.at(value, rows)


def _refusal(at: AtSite, why: str) -> str:
    return (
        f"deep-lift does not apply at {at.layout.site}: the model has non-linear parts after it that are functions, "
        f"are used more than once or have no rule, such as attention and normalisation ({why}). Use "
        "integrated-gradients"
    )


@contextlib.contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Remove the attributes that DeepLift leaves on modules if the model raises."""
    before = [(module, set(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, known in before:
            for name in set(vars(module)) - known:
                delattr(module, name)
