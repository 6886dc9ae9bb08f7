"""Sparse adjacencies, decomposed layers, two sets of nodes: what is fused is taken apart while tapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv, GraphConv, SAGEConv

import maskhooks
from maskhooks.errors import BatchError, UnfiredSiteWarning
from maskhooks.model.hooked import Hooked
from tests.adapters.geometric_models import EDGES, randn
from tests.adapters.geometric_values import pairs, values
from tests.conftest import same_bits

Unchanged = Callable[[nn.Module], nn.Module]


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "edge-index"])
def test_fused_sums_are_taken_apart_while_tapped(layout: str, unchanged: Unchanged) -> None:
    model = unchanged(SAGEConv(3, 4, aggr="sum").eval())
    x = randn(5, 3)
    order = torch.argsort(EDGES[1] * 5 + EDGES[0])  # as a sparse tensor has them, which adds up edges that occur twice
    kept = EDGES[:, order[[0, 2, 3, 4, 5, 6]]] if layout != "edge-index" else EDGES[:, order]
    adjacency: Any
    if layout == "edge-index":
        adjacency = EdgeIndex(kept, sparse_size=(5, 5), sort_order="col")
        adjacency.fill_cache_()
    else:
        adjacency = torch.sparse_coo_tensor(kept.flip(0), torch.ones(kept.shape[1]), (5, 5)).coalesce()
        adjacency = adjacency.to_sparse_csr() if layout == "csr" else adjacency
    hooked = maskhooks.wrap(model)
    with torch.no_grad():
        usual = model(x, adjacency)
        with hooked.tap(read=["message:output", "edges:output"]) as tap:
            opened = hooked((x, adjacency))
    assert torch.allclose(usual, opened, atol=1e-6)
    assert pairs(tap.values["edges:output"]) == pairs(kept.t())
    assert torch.equal(tap.values["message:output"], x[kept[0]])
    assert model.fuse


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
def test_a_layout_without_messages_is_refused(unchanged: Unchanged) -> None:
    model = unchanged(SAGEConv(3, 4))
    adjacency = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(7), (5, 5)).to_sparse_csc()
    hooked = maskhooks.wrap(model, call=lambda model, given: model(*given))
    with pytest.raises(BatchError, match=r"layout torch\.sparse_csc.*to_sparse_csr"), hooked.tap(read="message"):
        hooked((randn(5, 3), adjacency))


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_weights_that_only_the_fused_way_knows_are_refused(layout: str, unchanged: Unchanged) -> None:
    adjacency = torch.sparse_coo_tensor(EDGES[:, 1:].flip(0), torch.arange(1.0, 7.0), (5, 5)).coalesce()
    adjacency = adjacency.to_sparse_csr() if layout == "csr" else adjacency
    knows, model = GraphConv(3, 4), unchanged(SAGEConv(3, 4))
    hooked = maskhooks.wrap(model)
    with pytest.raises(BatchError, match=r"holds weights. SAGEConv.*Give an edge_index"):
        read(hooked, (randn(5, 3), adjacency))
    hooked = maskhooks.wrap(knows)
    with torch.no_grad(), hooked.tap(read="message") as tap:
        opened = hooked((randn(5, 3), adjacency))
    assert torch.allclose(opened, hooked.model(randn(5, 3), adjacency), atol=1e-6)
    assert len(tap.values["message:output"]) == 5


def test_decomposed_layers_are_whole_while_tapped(unchanged: Unchanged) -> None:
    model = unchanged(GCNConv(4, 4, decomposed_layers=2).eval())
    x = randn(5, 4)
    hooked = maskhooks.wrap(model)
    with torch.no_grad():
        usual = model(x, EDGES)
        with hooked.tap(read="message") as tap:
            assert same_bits(hooked((x, EDGES)), usual)
    assert tap.values["message:output"].shape == (11, 4)
    assert model.decomposed_layers == 2


def test_between_two_sets_of_nodes() -> None:
    hooked = maskhooks.wrap(SAGEConv((3, 2), 4))
    edges, sources, targets = torch.tensor([[0, 5, 2], [1, 0, 1]]), randn(6, 3), randn(2, 2)
    source, target = values(hooked, ((sources, targets), edges), "source:output", "target:output")
    assert torch.equal(source, sources[edges[0]])
    assert torch.equal(target, targets[edges[1]])
    with torch.no_grad(), hooked.tap(read=["source:output", "target:output", "message:output"]) as tap:
        hooked(((sources, None), edges))
        hooked(((sources, targets), edges))
    assert len(tap.values["target:output"]) == 3


def test_layers_without_states_of_those_that_receive() -> None:
    hooked = maskhooks.wrap(SAGEConv((3, 2), 4))
    given = ((randn(6, 3), None), torch.tensor([[0, 5, 2], [1, 0, 1]]))
    with pytest.warns(UnfiredSiteWarning, match="2 optional sites never fired: edge_target:output, target:output"):
        found = read(hooked, given)
    assert "target:output" not in found
    assert len(found["source:output"]) == 3


def read(hooked: Hooked, data: Any) -> Any:
    with torch.no_grad(), hooked.tap(read=["source", "target", "message"]) as tap:
        hooked(data)
    return tap.values
