"""What maskhooks finds through the entry point: light, the parts stand in files of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from maskhooks import hookimpl
from maskhooks.explainers.base import Explainer
from maskhooks.masks.gates import Gate
from maskhooks.model.adapter import Adapter
from maskhooks_example.adapter import PyramidAdapter
from maskhooks_example.gate import Step
from maskhooks_example.gradient import GradientNorm


@hookimpl
def maskhooks_adapters() -> Sequence[Adapter]:
    return [PyramidAdapter()]


@hookimpl
def maskhooks_gates() -> Mapping[str, Callable[..., Gate]]:
    return {"step": Step}


@hookimpl
def maskhooks_explainers() -> Mapping[str, Callable[..., Explainer]]:
    return {"gradient-norm": GradientNorm}
