"""Graphs as batches: how they become a call, whose positions are, and what predictions mean."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

pytest.importorskip("torch_geometric")

from maskhooks_geometric import task
from maskhooks_geometric.graphs import Graphs
from maskhooks_geometric.messages import Messages
from maskhooks_geometric.sent import Sent
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN, GCNConv, GraphSAGE, SAGEConv, global_add_pool
from torch_geometric.utils import k_hop_subgraph

import maskhooks
from maskhooks.errors import UnknownDistributionError
from maskhooks.model.outputs import Positions, agreement, kl, prediction_loss
from maskhooks.passes.clean import clean_pass
from tests.adapters.geometric_models import EDGES, Links, Nodes, Pooled, Typed, batch, graph, hetero, randn
from tests.adapters.geometric_values import outputs

Unchanged = Callable[[nn.Module], nn.Module]


def test_a_prediction_for_each_graph() -> None:
    model, data = Pooled(), batch()
    found = outputs(model, data)
    assert isinstance(found, Categorical)
    with torch.no_grad():
        assert torch.allclose(found.logits, model(data.x, data.edge_index, data.batch).log_softmax(-1))
    hooked = maskhooks.wrap(model)
    about = maskhooks.Random(hooked, "edge").explain(data).metadata
    assert [one["target"] for one in about.values()] == ["1", "1", "0"]
    assert all(one["prediction"] in ("0", "1") for one in about.values())


def test_a_prediction_for_each_node() -> None:
    """All of a graph's nodes count, those that its `node_index` names, or those that are given."""
    model, data = Nodes(), batch()
    found = outputs(model, data)
    assert isinstance(found, Positions)
    assert found.chosen.sum(1).tolist() == [5, 3, 6]
    named = Batch.from_data_list([graph(node_index=torch.tensor([n])) for n in (2, 4)])
    found = outputs(model, named)
    assert isinstance(found, Categorical)
    with torch.no_grad():
        wanted = model(named.x, named.edge_index)[[2, 9]].log_softmax(-1)
    assert torch.allclose(found.logits, wanted)
    given = outputs(model, graph(), index=lambda data: torch.tensor([True, False, True, False, False]))
    assert given.chosen.sum().item() == 2


def test_labels_that_do_not_exclude_each_other() -> None:
    data = batch()
    data.y = (randn(14, 3) > 0).float()
    data.y[0, 0] = torch.nan  # not known
    found = outputs(Nodes(), data)
    assert isinstance(found, Positions)
    assert isinstance(found.distribution, Bernoulli)
    assert found.distribution.logits.shape == (3, 6, 3)
    assert torch.equal(agreement(found, found), torch.ones(3))
    assert kl(found, found).shape == prediction_loss(found, found).shape == (3,)
    other = Positions(Bernoulli(logits=found.distribution.logits + 1), found.chosen)
    each = kl_divergence(found.distribution, other.distribution).sum(-1)
    assert torch.allclose(kl(found, other), torch.stack([each[0, :5].mean(), each[1, :3].mean(), each[2].mean()]))
    masks = maskhooks.GraphMask(maskhooks.wrap(Nodes()), amortized=False, recipe=maskhooks.Recipe(steps=2))
    assert len(masks.explain(data)) == 3 * data.num_edges
    data.y = randn(14, 3)
    with pytest.raises(UnknownDistributionError, match="is 3 numbers, as in regression"):
        outputs(Nodes(), data)
    data.y = data.y.softmax(-1)
    assert isinstance(outputs(Nodes(), data).distribution, Categorical)


def test_a_prediction_for_each_link() -> None:
    pairs = torch.tensor([[0, 1, 4], [2, 0, 3]])
    data = [graph(edge_label_index=pairs, edge_label=torch.tensor([1.0, 0.0, 1.0])) for _ in range(2)]
    found = outputs(Links(), Batch.from_data_list(data))
    assert isinstance(found, Positions)
    assert isinstance(found.distribution, Bernoulli)
    assert found.chosen.shape == (2, 3)
    one = graph(edge_label_index=pairs[:, :1], edge_label=torch.tensor([1.0]))
    assert outputs(Links(), one).logits.shape == (1,)
    picked = graph(edge_label_index=pairs, edge_label=torch.tensor([1, 0, 1]), link_index=torch.tensor([1]))
    assert outputs(Links(), picked).logits.shape == (1,)


def test_a_prediction_for_nodes_of_a_type() -> None:
    found = outputs(Typed(), hetero())
    assert found.chosen.shape == (1, 4)
    several = Batch.from_data_list([hetero(), hetero()])
    assert outputs(Typed(), several).chosen.shape == (2, 4)
    rows = maskhooks.Random(maskhooks.wrap(Typed()), "message").explain(several)
    assert sorted(set(rows["example"])) == [0, 1]
    for example in (0, 1):
        assert rows.select(example=example)["target"].max() == 2


@pytest.mark.parametrize("kind", [GCN, GraphSAGE])
def test_models_of_the_library(kind: Any, unchanged: Unchanged) -> None:
    model = unchanged(kind(3, 4, num_layers=2, out_channels=2, dropout=0.5))
    hooked = maskhooks.wrap(model, example=graph())
    assert [str(site) for site in hooked.sites.tagged("message")] == [
        "convs.0.message:output",
        "convs.1.message:output",
    ]
    own = 11 if kind is GCN else 7  # GCN sends each node a message to itself
    for data in (graph(), (graph().x, EDGES), {"x": graph().x, "edge_index": EDGES}):
        rows = maskhooks.Random(hooked, "message").explain(data)
        assert len(rows) == 2 * own
    assert maskhooks.Random(hooked, "message").explain(batch()).columns["example"].max() == 2


def test_a_model_that_takes_the_whole_batch() -> None:
    class Whole(Pooled):
        def forward(self, data: Any) -> Any:
            return super().forward(data.x, data.edge_index, data.batch)

    data = batch()
    rows = maskhooks.Random(maskhooks.wrap(Whole()), "edge").explain(data)
    assert len(rows) == data.num_edges


def test_sampled_subgraphs_keep_the_graphs_numbers() -> None:
    """As a NeighborLoader gives them: `n_id` says what nodes are called, the first `batch_size` are asked about."""
    whole = graph(8, torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]]))
    nodes, edges, _, _ = k_hop_subgraph([5], 2, whole.edge_index, relabel_nodes=True)
    order = torch.tensor([int((nodes == 5).nonzero()), *(n for n, node in enumerate(nodes) if node != 5)])
    place = torch.argsort(order)
    sampled = Data(x=whole.x[nodes[order]], edge_index=place[edges], n_id=nodes[order], batch_size=1)
    model = Nodes().eval()
    found = outputs(model, sampled)
    assert isinstance(found, Categorical)
    rows = maskhooks.Random(maskhooks.wrap(model), "edge").explain(sampled)
    assert sorted(zip(rows["source"], rows["target"], strict=True)) == [(3, 4), (4, 5)]
    assert rows["label"].tolist()[0] in ("3→4", "4→5")


def test_layers_called_with_the_edges_the_other_way_round() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.along, self.against = SAGEConv(3, 4), GCNConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.against(self.along(x, edge_index), edge_index.flip(0))

    rows = maskhooks.Random(maskhooks.wrap(Both().eval()), "against.message:output").explain(graph())
    for source, target, edge in zip(rows["source"], rows["target"], rows["edge"], strict=True):
        assert source == target if edge < 0 else (target, source) == tuple(EDGES[:, edge].tolist())
    assert sorted(rows["edge"][rows["edge"] >= 0].tolist()) == list(range(7))


def test_a_node_by_its_number() -> None:
    model = Nodes()
    found = outputs(model, graph(node_index=3))
    assert torch.equal(found.logits, outputs(model, graph(node_index=torch.tensor([3]))).logits)
    assert found.logits.shape == (1, 3)


def test_another_input_for_the_bypass_test() -> None:
    hooked, data = maskhooks.wrap(Pooled()), graph(edge_attr=randn(7, 2))
    varied = hooked.task.perturb(data, torch.Generator().manual_seed(0))
    assert varied is not None
    assert not torch.equal(varied.x, data.x)
    assert torch.equal(varied.x.sort(0).values, data.x.sort(0).values)
    assert torch.equal(varied.edge_index, data.edge_index)


def test_names_that_other_libraries_use() -> None:
    """A sparse adjacency for an edge_index, a column of attributes for weights."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = SAGEConv(3, 2)

        def forward(self, x: Tensor, adj_t: Any, edge_weight: Any = None) -> Any:
            self.seen = edge_weight
            return global_add_pool(self.conv(x, adj_t), None)

    model = Weighted()
    maskhooks.wrap(model)(graph(edge_attr=randn(7)))
    assert torch.equal(model.seen, randn(7))


@pytest.mark.parametrize("shuffled", [False, True])
def test_messages_along_all_edges_in_order_are_numbered_as_any_others(shuffled: bool) -> None:
    edges = [torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]), torch.tensor([[1, 0, 1], [0, 1, 1]])]
    both = Batch.from_data_list([Data(x=torch.ones(int(e.max()) + 1, 2), edge_index=e) for e in edges])
    if shuffled:  # edges of the two graphs in turns
        both.edge_index = both.edge_index[:, [4, 0, 5, 1, 6, 2, 3]]
    source, target = both.edge_index
    rest = [torch.full_like(source, number) for number in (-1, 0, both.num_nodes)]
    usual = Messages(Graphs(both), Sent(source, target, *rest), None)
    searched = Messages(Graphs(both), usual.sent, None)
    searched._in_order = None
    assert usual._in_order is not None
    graphs = usual.graph()
    assert graphs is not None
    assert torch.equal(graphs, (source >= 3).long())
    assert torch.equal(graphs, searched.graph())  # type: ignore[arg-type]
    for name, numbers in searched.columns().items():
        assert torch.equal(usual.columns()[name], numbers), name
    places = usual.columns()["edge"]
    for number in (0, 1):
        assert places[graphs == number].tolist() == list(range(4 - number))
    assert Messages(Graphs(both), usual.sent[:-1], None)._in_order is None


def test_what_is_known_of_messages_lasts_as_long_as_their_pass() -> None:
    gc.collect()
    before = len(task._messages)
    hooked = maskhooks.wrap(GCNConv(2, 2).eval())
    one = Data(x=torch.ones(2, 2), edge_index=torch.tensor([[0, 1], [1, 0]]))
    (site,) = hooked.find("message")
    clean = clean_pass(hooked, one, [site])
    assert clean.places[site].example_index is not None
    assert len(task._messages) == before + 1
    del clean
    gc.collect()
    assert len(task._messages) == before
