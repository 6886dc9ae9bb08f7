"""The built-in plugin: our own parts, registered through the same hooks as third-party plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.optim import Optimizer

from maskhooks.explainers.attention import Attention
from maskhooks.explainers.base import Explainer
from maskhooks.explainers.beam import Beam
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.explainers.erasure import Erasure
from maskhooks.explainers.graphmask import GraphMask
from maskhooks.explainers.guan import Guan
from maskhooks.explainers.iba import IBA
from maskhooks.explainers.leave_one_out import LeaveOneOut
from maskhooks.explainers.random import Random
from maskhooks.explainers.readout import Readout
from maskhooks.explainers.reinforce import Reinforce
from maskhooks.explainers.rollout import Rollout
from maskhooks.explainers.schulz import Schulz
from maskhooks.masks.baselines import Baseline, Learned, Mean, Noise, Token, Zero
from maskhooks.masks.gates import Bernoulli, Gate, HardConcrete
from maskhooks.masks.probes import MLP, PaperMLP, Probe, SummedMLP
from maskhooks.metrics.agreement import Deviation, Kendall, Spearman, TopKOverlap
from maskhooks.metrics.erasure import (
    AOPC,
    AreaBetween,
    Comprehensiveness,
    DivergenceKept,
    LeRF,
    LogOdds,
    MoRF,
    Sufficiency,
)
from maskhooks.metrics.metric import Metric
from maskhooks.metrics.randomised_weights import RandomisedWeights
from maskhooks.metrics.truth import (
    AUROC,
    F1,
    JS,
    KL,
    AveragePrecision,
    MeanRank,
    Optimality,
    Precision,
    PrecisionAtK,
    Recall,
)
from maskhooks.model.outputs import Divergence, kl, lost_lead, prediction_loss, squared_error
from maskhooks.model.source import Factory, Source
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks.training.objectives import AugmentedLagrangian, Objective, PaperLagrangian, RatioLagrangian
from maskhooks.training.optimizers import adam, lookahead, rmsprop
from maskhooks.training.penalty import Penalty
from maskhooks.training.presets import presets
from maskhooks.training.recipe import Recipe


@hookimpl
def maskhooks_gates() -> Mapping[str, Callable[..., Gate]]:
    return {
        "hard-concrete": HardConcrete,
        "hard-concrete-louizos": HardConcrete.louizos,
        "hard-concrete-rounded": HardConcrete.straight_through,
        "bernoulli": Bernoulli,
    }


@hookimpl
def maskhooks_baselines() -> Mapping[str, Callable[..., Baseline]]:
    return {"learned": Learned, "zero": Zero, "mean": Mean, "token": Token, "noise": Noise}


@hookimpl
def maskhooks_probes() -> Mapping[str, Callable[..., Probe]]:
    return {"mlp": MLP, "summed": SummedMLP, "paper": PaperMLP}


@hookimpl
def maskhooks_objectives() -> Mapping[str, Callable[..., Objective]]:
    return {
        "augmented": AugmentedLagrangian,
        "ratio": RatioLagrangian,
        "paper": PaperLagrangian,
    }


@hookimpl
def maskhooks_penalties() -> Mapping[str, Callable[..., Penalty]]:
    return {"divergence": Penalty}


@hookimpl
def maskhooks_optimizers() -> Mapping[str, Callable[..., Optimizer]]:
    return {"adam": adam, "lookahead": lookahead, "rmsprop": rmsprop}


@hookimpl
def maskhooks_divergences() -> Mapping[str, Divergence]:
    return {
        "kl": kl,
        "prediction-loss": prediction_loss,
        "lost-lead": lost_lead,
        "squared-error": squared_error,
    }


@hookimpl
def maskhooks_recipes() -> Mapping[str, Recipe]:
    return presets()


@hookimpl
def maskhooks_explainers() -> Mapping[str, Callable[..., Explainer]]:
    return {
        "diffmask": DiffMask,
        "graphmask": GraphMask,
        "random": Random,
        "reinforce": Reinforce,
        "erasure": Erasure,
        "leave-one-out": LeaveOneOut,
        "beam": Beam,
        "iba": IBA,
        "schulz": Schulz,
        "readout": Readout,
        "guan": Guan,
        "attention": Attention,
        "rollout": Rollout,
    }


@hookimpl
def maskhooks_metrics() -> Mapping[str, Callable[..., Metric]]:
    metrics: list[type[Metric]] = [
        *(Comprehensiveness, Sufficiency, AOPC, MoRF, LeRF, AreaBetween, LogOdds, DivergenceKept),
        *(Precision, Recall, F1, Optimality, AUROC, AveragePrecision, PrecisionAtK, MeanRank, KL, JS),
        *(Kendall, Spearman, TopKOverlap, Deviation, RandomisedWeights),
    ]
    return {metric.name: metric for metric in metrics}


@hookimpl
def maskhooks_sources() -> Mapping[str, Source]:
    return {"factory": Factory()}
