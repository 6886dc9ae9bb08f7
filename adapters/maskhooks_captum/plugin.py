"""Registers Captum's methods as explainers, and its metrics. Importing this does not import captum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskhooks.explainers.base import Explainer
from maskhooks.metrics.metric import Metric
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_captum.gradients import DeepLift, InputXGradient, IntegratedGradients
from maskhooks_captum.infidelity import Infidelity
from maskhooks_captum.perturbations import FeatureAblation, KernelShap, Lime, Occlusion, ShapleySampling
from maskhooks_captum.sensitivity import SensitivityMax


@hookimpl
def maskhooks_explainers() -> Mapping[str, Callable[..., Explainer]]:
    return {
        kind.name: kind
        for kind in (
            IntegratedGradients,
            InputXGradient,
            DeepLift,
            FeatureAblation,
            Occlusion,
            ShapleySampling,
            KernelShap,
            Lime,
        )
    }


@hookimpl
def maskhooks_metrics() -> Mapping[str, Callable[..., Metric]]:
    return {kind.name: kind for kind in (Infidelity, SensitivityMax)}
