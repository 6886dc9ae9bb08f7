"""Masks of edges, trained in two processes: as in one with the global batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, GraphConv, SAGEConv, global_add_pool

import maskhooks
from maskhooks import DiffMask, GraphMask, Recipe
from tests.adapters.geometric_models import EDGES, randn
from tests.distributed.test_ranks import TWO, same

pytestmark = pytest.mark.filterwarnings(
    "ignore::maskhooks.errors.MarginWarning", "ignore:.*multi-threaded.*fork.*:DeprecationWarning"
)
QUICK = dataclasses.replace(Recipe.named("graph"), steps=16, warmup_steps=4, validations=4, baseline_steps=4)


class Net(nn.Module):
    def __init__(self, kind: Any = GraphConv) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = kind(3, 6), SAGEConv(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        hidden = self.second(self.first(x, edge_index).tanh(), edge_index).tanh()
        predicted: Tensor = self.last(global_add_pool(hidden, batch))
        return predicted


def graphs(count: int, size: int) -> DataLoader:
    """Of five to seven nodes and edges that differ; every other one has no more than a pair."""
    features = randn(count, 7, 3)
    data = [
        Data(x=features[n, : 5 + n % 3], edge_index=torch.cat([EDGES, EDGES.flip(0)], 1)[:, :: 1 + n % 4])
        for n in range(count)
    ]
    return DataLoader(data, batch_size=size)


def fitted(devices: Any, make: Any, kind: Any = GraphConv, **options: Any) -> Any:
    """13 graphs: of the last round with batches of 2, the second process has no batch."""
    hooked = maskhooks.wrap(Net(kind), example=next(iter(graphs(4, 4))), **options)
    return make(hooked).fit(
        graphs(13, 2 if devices else 4),
        graphs(5, 2),
        progress=False,
        accelerator="cpu",
        epochs=4,
        cache=None,
        **devices,
    )


@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, {}), ({"tied": True, "gate": "hard-concrete-rounded"}, {}), ({}, {"units": "undirected"})],
)
def test_messages_of_all_layers_in_one_pass(settings: dict[str, Any], options: dict[str, Any]) -> None:
    def make(hooked: maskhooks.Hooked) -> GraphMask:
        return GraphMask(hooked, margin=0.01, recipe=QUICK, **settings)

    one, two = (fitted(devices, make, **options) for devices in ({}, TWO))
    same(one, two)
    assert len({row["divergence"] for row in one.result.log}) == 16


@pytest.mark.parametrize("sites", ["message", "edge", "first:output", "input"])
def test_a_layer_at_a_time_edges_in_all_and_states_of_nodes(sites: str) -> None:
    """Masks of inputs, as known from states above, begin with baselines fitted under random masks."""

    def make(hooked: maskhooks.Hooked) -> DiffMask:
        return DiffMask(hooked, sites, margin=0.01, recipe=QUICK)

    one, two = (fitted(devices, make) for devices in ({}, TWO))
    same(one, two)


@pytest.mark.parametrize("sites", [None, "first.message:output"])
def test_layers_that_add_messages_below_those_of_edges(sites: str | None) -> None:
    """Their rows stand in another order in the global batch."""

    def make(hooked: maskhooks.Hooked) -> DiffMask:
        if sites is None:
            return GraphMask(hooked, margin=0.01, recipe=QUICK)
        return DiffMask(hooked, sites, margin=0.01, recipe=QUICK)

    one, two = (fitted(devices, make, GCNConv) for devices in ({}, TWO))
    same(one, two)
