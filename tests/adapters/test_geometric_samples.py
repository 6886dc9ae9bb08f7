"""Sampled subgraphs, as loaders of large graphs give them: rows name the whole graph's nodes and edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

pytest.importorskip("torch_geometric")

from maskhooks_geometric.masks import edge_masks
from maskhooks_geometric.peer import Peer
from torch_geometric.data import Data
from torch_geometric.explain.algorithm import DummyExplainer
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import trim_to_layer

import maskhooks
from maskhooks.model.outputs import Positions
from maskhooks.passes.clean import clean_pass
from tests.adapters.geometric_loaders import around_links, around_nodes
from tests.adapters.geometric_models import RELATIONS, Links, Nodes, Rates, Typed, hetero, randn


def ring(**more: Any) -> Data:
    """A ring of twelve, its edges in no order."""
    order = torch.tensor([7, 2, 11, 5, 0, 9, 4, 1, 10, 3, 8, 6])
    edges = torch.stack([order, (order + 1) % 12])
    return Data(x=randn(12, 3), edge_index=edges, y=torch.arange(12) % 3, **more)


def sent(explanation: Any, example: int | None = None) -> list[tuple[int, int, int]]:
    rows = explanation if example is None else explanation.select(example=example)
    return sorted(zip(*(rows[name].tolist() for name in ("source", "target", "edge")), strict=True))


def whole(data: Data, targets: set[int]) -> list[tuple[int, int, int]]:
    """The edges of the whole graph that end in some nodes."""
    ends = enumerate(data.edge_index.T.tolist())
    return sorted((source, target, edge) for edge, (source, target) in ends if target in targets)


def test_rows_name_nodes_and_edges_of_the_whole_graph() -> None:
    data, model = ring(), Nodes().eval()
    hooked = maskhooks.wrap(model)
    (first, second) = around_nodes(data, torch.tensor([3, 4, 9]), hops=3)
    for sampled, targets in ((first, {1, 2, 3, 4}), (second, {7, 8, 9})):
        assert sent(maskhooks.Random(hooked, "edge").explain(sampled)) == whole(data, targets)
        rows = maskhooks.Random(hooked, "first.message:output").explain(sampled)
        assert sent(rows) == whole(data, targets)
        assert set(rows["label"]) == {f"{target - 1}→{target}" for target in targets}


def test_the_predictions_of_seeds_count() -> None:
    data, model = ring(), Nodes().eval()
    with torch.no_grad():
        wanted = model(data.x, data.edge_index).log_softmax(-1)
    hooked = maskhooks.wrap(model)
    first, second = around_nodes(data, torch.tensor([3, 4, 9]), hops=3)
    found = clean_pass(hooked, first, []).outputs
    assert isinstance(found, Positions)
    assert torch.allclose(found.distribution.logits[found.chosen], wanted[[3, 4]], atol=1e-6)
    found = clean_pass(hooked, second, []).outputs
    assert isinstance(found, Categorical)
    assert torch.allclose(found.logits, wanted[[9]], atol=1e-6)
    about = maskhooks.Random(hooked, "edge").explain(second).metadata[0]
    assert about == {"prediction": str(int(wanted[9].argmax())), "target": "0"}


def test_each_seed_by_itself() -> None:
    """A loader that is disjoint has neighbours of its own for each seed, which is an example then."""
    data, model = ring(), Nodes().eval()
    hooked = maskhooks.wrap(model)
    sampled, _ = around_nodes(data, torch.tensor([3, 4, 9]), hops=3, disjoint=True)
    found = clean_pass(hooked, sampled, []).outputs
    with torch.no_grad():
        assert torch.allclose(found.logits, model(data.x, data.edge_index)[[3, 4]].log_softmax(-1), atol=1e-6)
    rows = maskhooks.Random(hooked, "edge").explain(sampled)
    assert sent(rows, 0) == whole(data, {1, 2, 3})
    assert sent(rows, 1) == whole(data, {2, 3, 4})
    assert [one["target"] for one in rows.metadata.values()] == ["0", "1"]


class Trimmed(nn.Module):
    """Computes what its seeds need alone, and predicts for them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SAGEConv(3, 6), SAGEConv(6, 3)

    def forward(
        self, x: Tensor, edge_index: Tensor, batch_size: int, num_sampled_nodes: Any, num_sampled_edges: Any
    ) -> Tensor:
        hidden = self.first(x, edge_index).tanh()
        hidden, edge_index, _ = trim_to_layer(1, num_sampled_nodes, num_sampled_edges, hidden, edge_index)
        predicted: Tensor = self.second(hidden, edge_index)[:batch_size]
        return predicted


def test_a_model_that_trims_what_its_seeds_do_not_need() -> None:
    data, model = ring(), Trimmed().eval()
    (sampled,) = around_nodes(data, torch.tensor([3, 4]), hops=2)
    sampled.num_sampled_nodes, sampled.num_sampled_edges = [2, 1, 1], [2, 1]
    hooked = maskhooks.wrap(model, example=sampled)
    found = clean_pass(hooked, sampled, []).outputs
    assert found.chosen.shape == (1, 2)
    rows = maskhooks.Random(hooked, "message").explain(sampled)
    assert sent(rows.select(site="first.message:output")) == whole(data, {2, 3, 4})
    assert sent(rows.select(site="second.message:output")) == whole(data, {3, 4})


def test_links_of_a_sampled_subgraph() -> None:
    data, model = ring(), Links().eval()
    pairs, labels = torch.tensor([[3, 4, 9], [6, 7, 0]]), torch.tensor([1.0, 0.0, 1.0])
    with torch.no_grad():
        wanted = model(data.x, data.edge_index, pairs)
    hooked = maskhooks.wrap(model)
    both, _ = around_links(data, pairs, labels)
    found = clean_pass(hooked, both, []).outputs
    assert torch.allclose(found.distribution.logits[found.chosen], wanted[:2], atol=1e-6)
    assert sent(maskhooks.Random(hooked, "edge").explain(both)) == whole(data, {2, 3, 4, 5, 6, 7})
    apart, _ = around_links(data, pairs, labels, disjoint=True)
    assert torch.allclose(clean_pass(hooked, apart, []).outputs.logits, wanted[:2], atol=1e-6)
    rows = maskhooks.Random(hooked, "edge").explain(apart)
    assert sent(rows, 0) == whole(data, {2, 3, 5, 6})
    assert sent(rows, 1) == whole(data, {3, 4, 6, 7})
    assert [one["target"] for one in rows.metadata.values()] == ["1", "0"]


@pytest.mark.parametrize("disjoint", [False, True])
def test_links_between_types_of_nodes(disjoint: bool) -> None:
    data, model = hetero(), Rates().eval()
    pairs, labels = torch.tensor([[3, 0], [2, 1]]), torch.tensor([1.0, 0.0])
    with torch.no_grad():
        wanted = model(data.x_dict, data.edge_index_dict, pairs)
    (sampled,) = around_links(data, (("user", "rates", "film"), pairs), labels, hops=1, disjoint=disjoint)
    hooked = maskhooks.wrap(model)
    found = clean_pass(hooked, sampled, []).outputs
    assert torch.allclose(found.logits if disjoint else found.distribution.logits[0], wanted, atol=1e-6)
    rows = maskhooks.Random(hooked, "message").explain(sampled)
    known = {(0, 3): (3, 2), (0, 2): (3, 1), (1, 2): (2, 0), (2, 1): (1, 0)}
    sent_ = zip(*(rows[name].tolist() for name in ("relation", "edge", "source", "target")), strict=True)
    assert {(relation, edge): ends for relation, edge, *ends in sent_} == {key: [*ends] for key, ends in known.items()}
    assert sorted(set(rows["example"].tolist())) == ([0, 1] if disjoint else [0])


@pytest.mark.parametrize("disjoint", [False, True])
def test_types_of_nodes(disjoint: bool) -> None:
    data, model = hetero(), Typed().eval()
    with torch.no_grad():
        wanted = model(data.x_dict, data.edge_index_dict).log_softmax(-1)
    (sampled,) = around_nodes(data, ("user", torch.tensor([1, 0])), hops=1, disjoint=disjoint)
    hooked = maskhooks.wrap(model)
    found = clean_pass(hooked, sampled, []).outputs
    logits = found.logits if disjoint else found.distribution.logits[found.chosen]
    assert torch.allclose(logits, wanted[[1, 0]], atol=1e-6)
    rows = maskhooks.Random(hooked, "message").explain(sampled)
    for number, relation in enumerate(RELATIONS):
        mine = rows["relation"] == number
        edges = data[relation].edge_index
        for source, target, edge in zip(*(rows[n][mine].tolist() for n in ("source", "target", "edge")), strict=True):
            assert edges[:, edge].tolist() == [source, target]
    assert len(rows) == 4
    seeds = [rows.select(example=number)["target"].tolist() for number in range(1 + disjoint)]
    assert [set(one) for one in seeds] == ([{1}, {0}] if disjoint else [{0, 1}])


def test_outputs_of_all_types_count_for_the_one_asked_about() -> None:
    class Every(Typed):
        def forward(self, x_dict: Any, edge_index_dict: Any) -> Any:
            return {kind: self.last(states) for kind, states in self.conv(x_dict, edge_index_dict).items()}

    (sampled,) = around_nodes(hetero(), ("film", torch.tensor([1])))
    found = clean_pass(maskhooks.wrap(Every().eval()), sampled, []).outputs
    assert found.logits.shape == (1, 2)


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_masks_are_trained_and_become_pygs() -> None:
    """As PyG has them, masks are in the order of the sampled edges."""
    data, model = ring(), Nodes().eval()
    sampled = around_nodes(data, torch.arange(12), size=4)
    masks = maskhooks.GraphMask(maskhooks.wrap(model), recipe=maskhooks.Recipe(steps=3))
    masks.fit(sampled[:2], sampled[2:], progress=False)
    one, hooked = sampled[0], masks.hooked
    rows = masks.explain(one)
    found = edge_masks(rows, hooked.task.graphs(one))[None]  # type: ignore[attr-defined]
    assert found.sites == tuple(rows.sites)
    for column, site in enumerate(found.sites):
        own = rows.select(site=site)
        wanted = [own["score"][own["edge"] == edge].max() for edge in one.e_id.tolist()]  # a layer is used twice
        assert set(own["edge"]) == set(one.e_id.tolist())
        assert found.by_layer[:, column].tolist() == pytest.approx(wanted)


def test_pygs_explainers_on_sampled_subgraphs() -> None:
    data = ring()
    sampled, _ = around_nodes(data, torch.tensor([3, 4, 9]))
    rows = Peer(maskhooks.wrap(Nodes()), DummyExplainer()).explain(sampled)
    assert sent(rows) == whole(data, {2, 3, 4})
