"""Registers the adapter for PyTorch Geometric. Importing this does not import torch_geometric."""

from __future__ import annotations

from maskhooks.model.adapter import Adapter
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_geometric.adapter import GeometricAdapter


@hookimpl
def maskhooks_adapters() -> list[Adapter]:
    return [GeometricAdapter()]
