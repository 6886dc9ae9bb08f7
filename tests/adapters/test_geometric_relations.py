"""Messages along edges of several relations or types: each in its own call, or all in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch.distributions import Categorical
from torch_geometric.data import HeteroData
from torch_geometric.nn import HANConv, HeteroConv, HGTConv, RGATConv, SAGEConv, to_hetero

import maskhooks
from maskhooks.errors import UnfiredSiteWarning
from tests.adapters.geometric_models import EDGES, RELATIONS, TYPES, Relational, Typed, graph, hetero, randn
from tests.adapters.geometric_values import pairs, values

Unchanged = Callable[[nn.Module], nn.Module]


class Two(nn.Module):
    """Two layers without types, for `converted`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SAGEConv((-1, -1), 6), SAGEConv((-1, -1), 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.second(self.first(x, edge_index).tanh(), edge_index)


def converted(plain: nn.Module, data: HeteroData) -> nn.Module:
    """The model as `to_hetero` makes it fit typed graphs, run once so that its weights have shapes."""
    model: nn.Module = to_hetero(plain, data.metadata())
    with torch.no_grad():
        model(data.x_dict, data.edge_index_dict)
    return model


def test_relations_are_below_each_other() -> None:
    hooked = maskhooks.wrap(Relational())
    data = graph(edge_type=TYPES)
    message, edges, second = values(hooked, data, "conv.message:output", "conv.edges:output", "conv.message@1:output")
    order = torch.argsort(TYPES, stable=True)
    assert pairs(edges) == pairs(EDGES[:, order].t())
    assert edges[:, 2].tolist() == TYPES[order].tolist()
    assert torch.equal(second, message[edges[:, 2] == 1])
    rows = maskhooks.Random(hooked, "message").explain(data)
    assert rows["relation"].tolist() == TYPES[order].tolist()
    assert rows["edge"].tolist() == order.tolist()  # the edge 2 -> 0 is there once as relation 1, and once as 0
    one = maskhooks.Random(hooked, hooked.sites["conv.message:output"].at(1)).explain(data)
    assert one["edge"].tolist() == [2, 5]


def test_relations_that_go_along_in_one_call() -> None:
    hooked = maskhooks.wrap(RGATConv(3, 4, num_relations=3))
    (edges,) = values(hooked, (randn(5, 3), EDGES, TYPES), "edges:output")
    assert edges[:, 2].tolist() == TYPES.tolist()


@pytest.mark.parametrize("made", ["HeteroConv", "to_hetero"])
def test_a_layer_for_each_relation(made: str, unchanged: Unchanged) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = SAGEConv((-1, -1), 6), nn.LazyLinear(2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.last(self.conv(x, edge_index).relu())

    data = hetero()
    model = unchanged(Typed() if made == "HeteroConv" else converted(Plain(), data))
    hooked = maskhooks.wrap(model, example=data)
    messages = hooked.sites.tagged("message")
    assert len(messages) == 3
    explanation = maskhooks.Random(hooked, "message").explain(data)
    seen = set()
    for site in explanation.sites:
        rows = explanation.select(site=site)
        (number,) = set(rows["relation"].tolist())
        edges = data[RELATIONS[number]].edge_index
        assert list(zip(rows["source"], rows["target"], strict=True)) == pairs(edges.t())
        assert rows["edge"].tolist() == list(range(edges.shape[1]))
        for column, kind in (("source_type", RELATIONS[number][0]), ("target_type", RELATIONS[number][2])):
            assert set(rows[column].tolist()) == {data.node_types.index(kind)}
        seen.add(number)
    assert seen == {0, 1, 2}


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("made", ["HeteroConv", "to_hetero"])
def test_layers_for_one_relation_each_have_one_depth(made: str) -> None:
    data = hetero()

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = ((3, 3), (6, 6))
            self.layers = nn.ModuleList([HeteroConv({key: SAGEConv(size, 6) for key in RELATIONS}) for size in wide])

        def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Any:
            for layer in self.layers:
                x_dict = {kind: x.tanh() for kind, x in layer(x_dict, edge_index_dict).items()}
            return x_dict["user"]

    model = Layers() if made == "HeteroConv" else converted(Two(), data)
    for example in (None, data):
        hooked = maskhooks.wrap(model, example=example)
        assert [site.depth for site in hooked.sites.tagged("message")] == [0, 0, 0, 1, 1, 1]
        assert [site.depth for site in hooked.sites.tagged("input")] == [0, 0, 0]
    explanation = maskhooks.Random(hooked, "message").explain(data)
    scores, depths, names = explanation.matrix()
    assert scores.shape == (2, 9) == (len(depths), len(names))
    assert depths == ["0", "1"]
    assert not (scores != scores).any()
    if made == "HeteroConv":  # by `to_hetero` films are predicted too, and a type alone is not asked about
        masks = maskhooks.GraphMask(hooked, recipe=maskhooks.Recipe(steps=2, layer_warmup=0.5))
        with pytest.warns(UnfiredSiteWarning, match="rates"):
            masks.fit([data], [data], progress=False)
        assert [part.depth for part in masks.groups[0].maskings] == [0, 0, 0, 1, 1]
        assert [part.depth for part in masks.groups[0].last_depths(0.0).maskings] == [1, 1]
        assert masks.explain(data).matrix()[1] == ["0", "1"]


@pytest.mark.parametrize("kind", [HGTConv, HANConv])
def test_a_layer_for_all_relations(kind: Any) -> None:
    data = hetero()
    conv = kind(3, 4, metadata=data.metadata(), heads=2)
    hooked = maskhooks.wrap(conv, output=lambda out: torch.distributions.Categorical(logits=out["user"].sum(0)[None]))
    rows = maskhooks.Random(hooked, "message").explain(data)
    found = [
        (*RELATIONS[r], s, t, e)
        for r, s, t, e in zip(rows["relation"], rows["source"], rows["target"], rows["edge"], strict=True)
    ]
    wanted = [(*key, s, t, e) for key in RELATIONS for e, (s, t) in enumerate(pairs(data[key].edge_index.t()))]
    assert sorted(found) == sorted(wanted)


def test_edges_of_all_types_at_once() -> None:
    data = hetero()
    rows = maskhooks.Random(maskhooks.wrap(Typed()), "edge").explain(data)
    found = list(zip(rows["relation"], rows["source"], rows["target"], rows["edge"], strict=True))
    assert sorted(found) == sorted(
        (n, s, t, e) for n, key in enumerate(RELATIONS) for e, (s, t) in enumerate(pairs(data[key].edge_index.t()))
    )


@pytest.mark.parametrize("made", ["HeteroConv", "to_hetero"])
def test_types_with_the_same_numbers_at_once(made: str) -> None:
    """As where each user has one film: the numbers of nodes do not say of which type an edge is."""
    data = hetero()
    for relation in RELATIONS:
        data[relation].edge_index = torch.tensor([[0, 1, 2], [0, 2, 1]])
    model = Typed() if made == "HeteroConv" else converted(Two(), data)
    rows = maskhooks.Random(maskhooks.wrap(model), "edge").explain(data)
    assert sorted(zip(rows["relation"], rows["edge"], strict=True)) == [(n, e) for n in range(3) for e in range(3)]


@pytest.mark.filterwarnings("ignore:There exist node types:UserWarning")
@pytest.mark.parametrize("kinds", [("a", "ba"), ("user", "super_user")])
def test_types_whose_names_contain_each_other(kinds: tuple[str, str]) -> None:
    one, other = ((kind, "to", "b") for kind in kinds)
    data = HeteroData()
    for kind in (*kinds, "b"):
        data[kind].x = randn(3, 3)
    data[one].edge_index, data[other].edge_index = torch.tensor([[0], [1]]), torch.tensor([[1, 2], [0, 1]])
    conv = HeteroConv({one: SAGEConv((3, 3), 2), other: SAGEConv((3, 3), 2)})
    hooked = maskhooks.wrap(conv, output=lambda out: Categorical(logits=out["b"].sum(0)[None]))
    rows = maskhooks.Random(hooked, "message").explain(data)
    assert rows["relation"].tolist() == [0, 1, 1]
    assert rows["edge"].tolist() == [0, 0, 1]
