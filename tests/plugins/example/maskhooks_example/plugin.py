"""What maskhooks finds through the entry point: one hook for each kind of part, and each part in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch.optim import Optimizer

from maskhooks import Recipe, hookimpl
from maskhooks.explainers.base import Explainer
from maskhooks.masks.baselines import Baseline
from maskhooks.masks.gates import Gate
from maskhooks.masks.probes import Probe
from maskhooks.metrics.metric import Metric
from maskhooks.model.adapter import Adapter
from maskhooks.model.outputs import Divergence
from maskhooks.model.source import Source
from maskhooks.model.task import Task
from maskhooks.training.objectives import Objective
from maskhooks.training.penalty import Penalty
from maskhooks_example.adapter import PyramidAdapter
from maskhooks_example.baseline import Midrange
from maskhooks_example.divergence import total_variation
from maskhooks_example.gate import Gaussian
from maskhooks_example.gradient import GradientNorm
from maskhooks_example.metric import Gini
from maskhooks_example.objective import ExponentiatedGradient
from maskhooks_example.optimizer import SignSGD
from maskhooks_example.penalty import Squared
from maskhooks_example.probe import Linear
from maskhooks_example.recipe import recipe
from maskhooks_example.shared_mask import SharedMask
from maskhooks_example.source import PyramidSource
from maskhooks_example.task import PyramidTask


@hookimpl
def maskhooks_adapters() -> Sequence[Adapter]:
    return [PyramidAdapter()]


@hookimpl
def maskhooks_tasks() -> Sequence[Task]:
    return [PyramidTask()]


@hookimpl
def maskhooks_gates() -> Mapping[str, Callable[..., Gate]]:
    return {"gaussian": Gaussian}


@hookimpl
def maskhooks_baselines() -> Mapping[str, Callable[..., Baseline]]:
    return {"midrange": Midrange}


@hookimpl
def maskhooks_probes() -> Mapping[str, Callable[..., Probe]]:
    return {"linear": Linear}


@hookimpl
def maskhooks_objectives() -> Mapping[str, Callable[..., Objective]]:
    return {"exponentiated": ExponentiatedGradient}


@hookimpl
def maskhooks_penalties() -> Mapping[str, Callable[..., Penalty]]:
    return {"squared": Squared}


@hookimpl
def maskhooks_optimizers() -> Mapping[str, Callable[..., Optimizer]]:
    return {"sign-sgd": SignSGD}


@hookimpl
def maskhooks_divergences() -> Mapping[str, Divergence]:
    return {"total-variation": total_variation}


@hookimpl
def maskhooks_recipes() -> Mapping[str, Recipe]:
    return {"example": recipe()}


@hookimpl
def maskhooks_explainers() -> Mapping[str, Callable[..., Explainer]]:
    return {"gradient-norm": GradientNorm, "shared-mask": SharedMask}


@hookimpl
def maskhooks_metrics() -> Mapping[str, Callable[..., Metric]]:
    return {"gini": Gini}


@hookimpl
def maskhooks_sources() -> Mapping[str, Source]:
    return {"pyramid": PyramidSource()}
