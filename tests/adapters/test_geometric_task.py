"""Graphs as batches: how they become a call, whose positions are, what predictions mean, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
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
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, GCNConv, GraphSAGE, SAGEConv, global_add_pool
from torch_geometric.utils import k_hop_subgraph

import maskhooks
from maskhooks.errors import (
    BatchError,
    NonFiniteError,
    ReplacementError,
    SettingError,
    UnfiredSiteWarning,
    UnknownDistributionError,
)
from maskhooks.model.outputs import Positions, agreement, kl, prediction_loss
from maskhooks.passes.forward import clean_pass, examples
from tests.adapters.geometric_models import EDGES, Links, Nodes, Pooled, Typed, batch, graph, hetero, randn

Unchanged = Callable[[nn.Module], nn.Module]


def outputs(model: Any, data: Any, **settings: Any) -> Any:
    return clean_pass(maskhooks.wrap(model.eval(), **settings), data, []).outputs


def test_a_prediction_for_each_graph() -> None:
    model, data = Pooled(), batch()
    found = outputs(model, data)
    assert isinstance(found, Categorical)
    with torch.no_grad():
        assert torch.allclose(found.logits, model(data.x, data.edge_index, data.batch).log_softmax(-1))
    hooked = maskhooks.wrap(model)
    about = maskhooks.Random(hooked, "edge").explain(data).examples
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
    with pytest.raises(UnknownDistributionError, match="3 numbers each, as of a regression"):
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


def test_masks_of_graphs_are_trained(unchanged: Unchanged) -> None:
    model, data = Pooled(), [graph(n) for n in (5, 6, 7, 8)]
    train, validation = DataLoader(data, batch_size=2), list(DataLoader(data, batch_size=3))
    hooked = maskhooks.wrap(unchanged(model))
    masks = maskhooks.DiffMask(hooked, "message", recipe=maskhooks.Recipe(steps=4))
    masks.fit(train, validation, progress=False)
    rows = masks.explain_all(validation)
    assert rows.columns["example"].max() == 3
    assert len(masks.evaluate(validation, progress=False)) == 2


@pytest.mark.parametrize("amortized", [True, False])
def test_types_of_edges_that_say_nothing_or_that_a_batch_has_none_of(amortized: bool, unchanged: Unchanged) -> None:
    """Messages to films reach no prediction for users; and a sampled graph may have edges of some types alone."""
    full, empty = hetero(), hetero()
    empty["user", "knows", "user"].edge_index = torch.empty(2, 0, dtype=torch.long)
    hooked = maskhooks.wrap(unchanged(Typed()), example=full)
    masks = maskhooks.GraphMask(hooked, amortized=amortized, recipe=maskhooks.Recipe(steps=3))
    if amortized:
        with pytest.warns(UnfiredSiteWarning, match=r"depends on conv.convs.<user___rates___film>.message:output:"):
            masks.fit([empty, full], [empty], progress=False)
    for data, wanted in ((full, {1: 3, 2: 2}), (empty, {1: 3})):
        rows = masks.explain(data)
        assert bool(np.isfinite(rows["score"]).all())
        counts = {number: int((rows["relation"] == number).sum()) for number in set(rows["relation"].tolist())}
        assert counts == (wanted if amortized else {0: 4, **wanted})


@pytest.mark.parametrize("amortized", [True, False])
def test_layers_with_messages_along_other_edges_are_not_tied(amortized: bool, unchanged: Unchanged) -> None:
    class Mixed(nn.Module):
        def __init__(self, second: Any, **settings: Any) -> None:
            super().__init__()
            self.first, self.second = SAGEConv(3, 4), second(4, 2, **settings)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.second(self.first(x, edge_index).tanh(), edge_index)

    def explain(model: nn.Module) -> Any:
        hooked = maskhooks.wrap(unchanged(model.eval()))
        masks = maskhooks.GraphMask(hooked, tied=True, amortized=amortized, recipe=maskhooks.Recipe(steps=2))
        return (masks.fit([graph()], progress=False) if amortized else masks).explain(graph())

    models = [Mixed(GCNConv), Mixed(SAGEConv, flow="target_to_source")]
    with pytest.raises(SettingError, match=r"in the same order \(7 and 11\), as where .* GraphMask\(hooked, 'edge'\)"):
        explain(models[0])
    assert len(explain(models[1])) == 7


def test_types_of_edges_with_the_same_numbers_are_not_tied() -> None:
    data = hetero()
    for relation in data.edge_types:
        data[relation].edge_index = torch.tensor([[0, 1], [1, 0]])
    hooked = maskhooks.wrap(Typed(), example=data)
    with pytest.raises(SettingError, match=r"in the same order \(2 and 2\)"):
        maskhooks.GraphMask(hooked, tied=True, amortized=False).explain(data)


def test_pooling_that_goes_by_masked_values_is_told() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SAGEConv(3, 4), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            x = self.first(x, edge_index)
            return self.second(x, edge_index[:, : 3 + int(x.sum() != clean)])

    model = Chosen().eval()
    with torch.no_grad():
        clean = model.first(graph().x, EDGES).sum()
    masks = maskhooks.GraphMask(maskhooks.wrap(model), amortized=False, recipe=maskhooks.Recipe(steps=2))
    with pytest.raises(ReplacementError, match=r"second.message:output: its value has shape \[4, 4\] behind masks"):
        masks.explain(graph())


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


def test_states_of_nodes_are_masked(unchanged: Unchanged) -> None:
    model = Pooled()
    hooked = maskhooks.wrap(unchanged(model), example=batch())
    masks = maskhooks.DiffMask(hooked, "first:output", recipe=maskhooks.Recipe(steps=3)).fit([batch()], progress=False)
    rows = masks.explain(batch())
    assert rows["example"].tolist() == batch().batch.tolist()
    assert rows["position"].tolist() == [*range(5), *range(3), *range(6)]


def test_a_store_keeps_what_edges_need(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Pooled()))
    found = []
    for store in (None, "memory"):
        masks = maskhooks.DiffMask(hooked, "message", recipe=maskhooks.Recipe(steps=4))
        found.append(masks.fit([batch()], progress=False, store=store).explain(batch())["score"])
    assert found[0].tolist() == found[1].tolist()


def test_graphs_without_edges(unchanged: Unchanged) -> None:
    empty = graph(2, torch.empty(2, 0, dtype=torch.long))
    model = Nodes()
    hooked = maskhooks.wrap(unchanged(model))
    with pytest.raises(BatchError, match="no message was sent"):
        maskhooks.Random(hooked, "message").explain(empty)
    with pytest.raises(BatchError, match="no message was sent"):
        maskhooks.DiffMask(hooked, "edge", amortized=False).explain(empty)
    mixed = maskhooks.Random(hooked, "first.message:output").explain(Batch.from_data_list([graph(), empty, graph()]))
    assert sorted(set(mixed["example"])) == [0, 2]


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (EDGES + 3, "holds 7 as a (source|target), and there are 5 nodes"),
        (EDGES - 1, "holds -1"),
    ],
)
def test_edges_that_do_not_match(edges: Tensor, message: str, unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Pooled()))
    with pytest.raises(BatchError, match=f"does not match the nodes: it {message}"):
        hooked(graph(edges=edges))
    with pytest.raises(BatchError, match="does not match the nodes"), hooked.tap(read="message"):
        hooked((graph().x, edges))


def test_edges_of_another_shape(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Pooled()))
    for edges in (EDGES.t(), EDGES.float(), EDGES[0]):
        with pytest.raises(BatchError, match=r"edge_index has shape .* two rows of whole numbers"):
            hooked((randn(5, 3), edges))
    with pytest.raises(BatchError, match="edge_index holds 7 edges, and edge_attr has 5 rows"):
        hooked(graph(edge_attr=randn(5, 2)))


def test_inputs_are_masked_as_known_from_the_states_above(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(Nodes(), example=graph())
    assert [str(site) for site in hooked.sites.tagged("input")] == ["first:input"]
    model = Pooled()
    masks = maskhooks.DiffMask(maskhooks.wrap(unchanged(model)), "input", recipe=maskhooks.Recipe(steps=2))
    rows = masks.fit([batch()], progress=False).explain(batch())
    assert sorted(set(rows["depth"])) == [0, 1]


def test_mixed_devices(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Pooled()))
    for name, data in (
        ("edge_index", graph(edges=EDGES.to("meta"))),
        ("edge_attr", graph(edge_attr=randn(7).to("meta"))),
    ):
        with pytest.raises(BatchError, match=rf"{name} is on meta, the model on cpu. Move the batch"):
            hooked(data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([graph(), graph()], r"a list of 2 graphs. Make it one: .*from_data_list"),
        (("x", randn(5, 3)), r"begins with 'x', as where a single Data or Batch is given for a loader"),
        (graph(batch=torch.zeros(4, dtype=torch.long)), r"says of 4 nodes .* and there are 5"),
        (graph(node_index=torch.tensor([5])), r"node_index, .* got \[5\] for 5 predictions"),
        (graph(node_index=torch.tensor([0.5])), r"node_index, .* got \[0.5\]"),
        (graph(node_index=torch.tensor([True])), r"node_index, .* got 1 truth values"),
    ],
)
def test_batches_that_are_none(given: Any, message: str, unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Nodes()))
    with pytest.raises(BatchError, match=message):
        maskhooks.GraphMask(hooked, amortized=False).explain(given)


def test_numbers_that_no_masks_are_on(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Nodes()))
    masks = maskhooks.GraphMask(hooked, "first.message:output", amortized=False, recipe=maskhooks.Recipe(steps=2))
    bad = graph()
    bad.x = torch.full_like(bad.x, torch.nan)
    with pytest.raises(NonFiniteError, match="outputs are not finite"):
        masks.explain(bad)


def test_a_node_by_its_number() -> None:
    model = Nodes()
    found = outputs(model, graph(node_index=3))
    assert torch.equal(found.logits, outputs(model, graph(node_index=torch.tensor([3]))).logits)
    assert found.logits.shape == (1, 3)


def test_what_cannot_be_known() -> None:
    model = Pooled()
    hooked = maskhooks.wrap(model)
    with pytest.raises(BatchError, match="needs edge_index, which the batch does not hold"):
        hooked(Data(x=randn(5, 3)))
    with pytest.raises(BatchError, match="level='edge' is none of node, link, graph"):
        maskhooks.wrap(model, level="edge")
    with pytest.raises(BatchError, match="are about each graph, and there are 5 of them for 1 graphs"):
        outputs(Nodes(), graph(), level="graph")
    with pytest.raises(BatchError, match="predicts 2 rows, and the batch holds 1 graphs of 5 nodes"):
        outputs(nn.Sequential(), graph(), call=lambda *_: randn(2, 3), task=maskhooks_task())
    with pytest.raises(UnknownDistributionError, match="do not say that these are logits of a binary class"):
        outputs(Links(), graph(edge_label_index=EDGES, edge_label=randn(7)))
    data = batch()
    data.batch = None
    with pytest.raises((BatchError, SettingError)):
        maskhooks.Random(hooked, "message").explain(data)


def maskhooks_task() -> Any:
    from maskhooks_geometric.task import GraphTask

    return GraphTask()


def test_another_input_for_the_bypass_test() -> None:
    hooked, data = maskhooks.wrap(Pooled()), graph(edge_attr=randn(7, 2))
    varied = hooked.task.vary(data, torch.Generator().manual_seed(0))
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
    assert examples(hooked, clean, site) is not None
    assert len(task._messages) == before + 1
    del clean
    gc.collect()
    assert len(task._messages) == before
