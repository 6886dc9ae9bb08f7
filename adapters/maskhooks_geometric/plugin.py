"""Registers the adapter for PyTorch Geometric, and its metrics. Importing this does not import torch_geometric."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maskhooks.metrics.metric import Metric
from maskhooks.model.adapter import Adapter
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_geometric.adapter import GeometricAdapter
from maskhooks_geometric.fidelity import Characterization, FidelityMinus, FidelityPlus, Unfaithfulness


@hookimpl
def maskhooks_adapters() -> list[Adapter]:
    return [GeometricAdapter()]


@hookimpl
def maskhooks_metrics() -> Mapping[str, Callable[..., Metric]]:
    return {kind.name: kind for kind in (FidelityPlus, FidelityMinus, Characterization, Unfaithfulness)}
