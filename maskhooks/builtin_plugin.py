"""Our own gates, baselines, explainers and sources, registered through the same hooks as a third party's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskhooks.explainers.base import Explainer
from maskhooks.explainers.beam import Beam
from maskhooks.explainers.diffmask import DiffMask
from maskhooks.explainers.erasure import Erasure
from maskhooks.explainers.graphmask import GraphMask
from maskhooks.explainers.leave_one_out import LeaveOneOut
from maskhooks.explainers.random import Random
from maskhooks.explainers.reinforce import Reinforce
from maskhooks.masks.baselines import Baseline, Learned, Mean, Token, Zero
from maskhooks.masks.gates import Bernoulli, Gate, HardConcrete
from maskhooks.model.source import Factory, Source
from maskhooks.plugins.hookspecs import hookimpl


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
    return {"learned": Learned, "zero": Zero, "mean": Mean, "token": Token}


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
    }


@hookimpl
def maskhooks_sources() -> Mapping[str, Source]:
    return {"factory": Factory()}
