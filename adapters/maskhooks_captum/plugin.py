"""Registers Captum's methods as explainers. Importing this does not import captum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskhooks.explainers.base import Explainer
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_captum.gradients import DeepLift, InputXGradient, IntegratedGradients
from maskhooks_captum.perturbations import FeatureAblation, KernelShap, Lime, Occlusion, ShapleySampling


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
