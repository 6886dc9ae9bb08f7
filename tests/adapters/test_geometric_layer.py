"""Layers as users have them: with a cache, scripted, within a wrapper, and with narrower numbers of nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data
from torch_geometric.nn import APPNP, GCNConv, SAGEConv, SGConv
from torch_geometric.utils import dropout_edge

import maskhooks
from maskhooks import GraphMask, Recipe
from maskhooks.errors import CompiledModelError, MaskhooksWarning, ModelError, ReplacementError
from tests.adapters.geometric_models import EDGES, Pooled, batch, graph, randn

Unchanged = Callable[[nn.Module], nn.Module]
OTHER = torch.tensor([[0, 1, 2], [1, 2, 3]])


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(3, 8, cached=True), GCNConv(8, 2, cached=True)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        result: Tensor = self.second(self.first(x, edge_index).relu(), edge_index)
        return result


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = GCNConv(3, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        result: Tensor = self.layer(x, edge_index, edge_weight)
        return result


def trained(model: nn.Module, data: Data, **settings: Any) -> GraphMask:
    hooked = maskhooks.wrap(model, **settings)
    return GraphMask(hooked, recipe=Recipe(steps=2, probe="summed")).fit([data], [data], progress=False)


def test_a_cache_is_as_it_was_after_training(unchanged: Unchanged) -> None:
    """Graphs of other edges are explained one after another, as each is normalised anew."""
    model = unchanged(Cached())
    for data in (graph(), graph(6, OTHER)):
        rows = trained(model, data, level="node").explain(data)
        assert len(rows) == 2 * (data.num_edges + data.num_nodes - (data.edge_index[0] == data.edge_index[1]).sum())
    assert model.first._cached_edge_index is None


@pytest.mark.parametrize("made", [lambda: GCNConv(3, 2, cached=True), lambda: APPNP(2, 0.1, cached=True)])
def test_a_cache_of_another_graph_is_refused(made: Callable[[], nn.Module], unchanged: Unchanged) -> None:
    model = made()
    with torch.no_grad():
        model(randn(5, 3), EDGES)
    hooked = maskhooks.wrap(unchanged(model), level="node")
    for edges in (EDGES, EDGES[:, torch.tensor([6, 1, 3, 0, 2, 5, 4])]):
        with torch.no_grad(), hooked.tap(read="message"):
            hooked(graph(edges=edges))
    for edges in (EDGES[:, :6], OTHER):
        with pytest.raises(ModelError, match="cached=True holds the edges of another graph"):
            maskhooks.Random(hooked, "message").explain(graph(edges=edges))


def test_a_cache_of_states_is_not_used_while_tapped() -> None:
    layer = SGConv(3, 2, cached=True)
    with torch.no_grad():
        layer(randn(5, 3), EDGES)
    hooked = maskhooks.wrap(layer, level="node")
    assert len(maskhooks.Random(hooked, "message").explain(graph(6, OTHER))) == 3 + 6


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_layers_are_refused() -> None:
    """They show no messages, and masks would be those of the other layers alone."""
    model: Any = Pooled()
    model.first = torch.jit.script(model.first)
    with pytest.raises(CompiledModelError, match="layer 'first', a GCNConv, is scripted"):
        maskhooks.wrap(model)
    with pytest.raises(CompiledModelError, match="the model is compiled or scripted"):
        maskhooks.wrap(torch.jit.script(SAGEConv(3, 2)))


def test_a_model_within_one_that_passes_on_what_it_is_given() -> None:
    """Its arguments are the model's, optional ones too."""
    model = Weighted()
    data = graph(edge_weight=torch.linspace(0.1, 2.0, EDGES.shape[1]))
    hooked = maskhooks.wrap(AveragedModel(model), level="node")
    with torch.no_grad():
        assert torch.equal(hooked(data), model(data.x, data.edge_index, data.edge_weight))
    assert len(trained(AveragedModel(Pooled()), batch()).explain(batch())) > 0


@pytest.mark.parametrize("settings", [{}, {"units": "undirected"}])
def test_narrower_numbers_of_nodes(settings: dict[str, Any], unchanged: Unchanged) -> None:
    torch.manual_seed(0)
    model = unchanged(SAGEConv(3, 2))
    wide, narrow = graph(), graph(edges=EDGES.int())
    masks = trained(model, narrow, level="node", **settings)
    one, other = (masks.explain(data).to_pandas() for data in (wide, narrow))
    assert one["edge"].tolist() == other["edge"].tolist() == list(range(EDGES.shape[1]))
    assert one.equals(other)


def test_edges_that_are_drawn_in_eval_mode() -> None:
    class Drops(Pooled):
        def forward(self, x: Tensor, edge_index: Any, batch: Tensor | None = None) -> Tensor:
            return super().forward(x, dropout_edge(edge_index, training=True)[0], batch)

    torch.manual_seed(0)
    data = batch()
    with (
        pytest.warns(MaskhooksWarning, match="draws random numbers even in eval mode"),
        pytest.raises(ReplacementError, match="or draws edges at random"),
    ):
        trained(Drops(), data)
