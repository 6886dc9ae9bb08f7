"""Edges left out, and smallest sets of edges: what hooks of our own on the layers find, set by set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from maskhooks_geometric.algorithm import MaskAlgorithm
from torch_geometric.data import Batch, Data
from torch_geometric.explain import Explainer
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import k_hop_subgraph

import maskhooks
from maskhooks.model.outputs import kl
from tests.adapters.geometric_loaders import around_nodes
from tests.adapters.geometric_models import Nodes, Pooled, Typed, graph, hetero, randn

Unchanged = Callable[[nn.Module], nn.Module]
Edge = tuple[int, int]

# Three edges in both directions, and one that goes one way.
BONDS = torch.tensor([[0, 1, 1, 2, 2, 0, 3], [1, 0, 2, 1, 0, 2, 0]])
PATH = torch.tensor([[0, 1, 2], [1, 2, 3]])


def pooled(model: nn.Module) -> Any:
    """With weights that make a difference."""
    torch.manual_seed(3)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)
    return model


def three() -> Batch:
    return Batch.from_data_list([graph(4, BONDS), graph(4, PATH), graph(5, BONDS.flip(1))])


def without(model: nn.Module, run: Callable[[], Any], closed: Collection[Edge], layers: Collection[str] = ()) -> Any:
    """What a model says where no message goes along some edges.

    Args:
        layers: where; default all.
    """
    handles, ends = [], {}
    for name, layer in model.named_modules():
        if isinstance(layer, MessagePassing) and (not layers or name in layers):

            def propagate(module: Any, inputs: Any) -> None:
                ends[module] = [tuple(edge) for edge in inputs[0].t().tolist()]

            def message(module: Any, inputs: Any, output: Tensor) -> Tensor:
                alive = torch.tensor([float(edge not in closed) for edge in ends[module]])
                return output * alive.view(-1, *(1,) * (output.dim() - 1))

            handles.append(layer.register_propagate_forward_pre_hook(propagate))
            handles.append(layer.register_message_forward_hook(message))
    with torch.no_grad():
        result = run()
    for handle in handles:
        handle.remove()
    return torch.distributions.Categorical(logits=result)


def edges_of(data: Data) -> list[Edge]:
    return [(int(source), int(target)) for source, target in data.edge_index.t().tolist()]


def undirected(edges: list[Edge]) -> list[list[Edge]]:
    """Edges by the two nodes between them."""
    pairs = dict.fromkeys(frozenset(edge) for edge in edges)
    return [[edge for edge in edges if frozenset(edge) == pair] for pair in pairs]


@pytest.mark.parametrize(
    ("site", "units"), [("edge", None), ("edge", "undirected"), ("second.message:output", "undirected")]
)
def test_the_smallest_sets_and_each_edge_left_out(site: str, units: Any, unchanged: Unchanged) -> None:
    model = unchanged(pooled(Pooled()))
    hooked = maskhooks.wrap(model, example=three(), units=units)
    layers = () if site == "edge" else ("second",)
    scores = maskhooks.LeaveOneOut(hooked, site).explain(three())
    found = maskhooks.Erasure(hooked, site, margin=0.1, max_positions=12).search(three(), progress=False)
    for number, data in enumerate(three().to_data_list()):
        run = lambda data=data: model(data.x, data.edge_index)  # noqa: E731
        loops = [(node, node) for node in range(data.num_nodes)] if layers else []  # which the layer adds
        edges = edges_of(data) + loops
        parts = [[edge] for edge in edges] if units is None else undirected(edges)
        clean = without(model, run, ())
        rows = scores.select(example=number)
        for part in parts:
            moved = 1 - torch.exp(-kl(clean, without(model, run, part, layers))).item()
            for source, target in part:
                own = rows["score"][(rows["source"] == source) & (rows["target"] == target)]
                assert own.tolist() == pytest.approx([moved], abs=1e-4)
        wanted: list[tuple[int, ...]] = []
        for size in range(len(parts) + 1):
            for kept in itertools.combinations(range(len(parts)), size):
                closed = [edge for at, part in enumerate(parts) if at not in kept for edge in part]
                if kl(clean, without(model, run, closed, layers)) <= 0.1:
                    wanted.append(tuple(edges.index(parts[at][0]) for at in kept))
            if wanted:
                break
        assert list(found[number].solutions) == wanted
        assert found[number].positions == len(parts)
    assert max(one.lower_bound for one in found) > 1
    assert scores["score"].max() > 0.1


def test_surroundings_of_nodes() -> None:
    torch.manual_seed(2)
    whole = Data(x=randn(9, 3), edge_index=torch.randint(9, (2, 14), generator=torch.Generator().manual_seed(5)))

    def around(node: int) -> Data:
        nodes, edges, index, _ = k_hop_subgraph(node, 2, whole.edge_index, relabel_nodes=True)
        return Data(x=whole.x[nodes], edge_index=edges, node_index=index)

    examples = [part for node in range(9) if (part := around(node)).num_edges]
    model = pooled(Nodes())
    data = Batch.from_data_list(examples)
    hooked = maskhooks.wrap(model, level="node", example=data)
    rows = maskhooks.LeaveOneOut(hooked, "edge").explain(data)
    for number, one in enumerate(examples):
        run = lambda one=one: model(one.x, one.edge_index)[one.node_index]  # noqa: E731
        clean = without(model, run, ())
        own = rows.select(example=number)
        assert list(zip(own["source"].tolist(), own["target"].tolist(), strict=True)) == edges_of(one)
        for (source, target), score in zip(edges_of(one), own["score"], strict=True):
            same = [edge for edge in edges_of(one) if edge == (source, target)]
            if len(same) == 1:
                moved = kl(clean, without(model, run, same))
                assert score == pytest.approx(1 - torch.exp(-moved).item(), abs=1e-4)


def test_graphs_of_any_form() -> None:
    model = pooled(Pooled())
    hooked = maskhooks.wrap(model, example=three())
    wanted = maskhooks.LeaveOneOut(hooked, "edge").explain(three())
    data = three()
    for form in (
        (data.x, data.edge_index, data.batch),
        {"x": data.x, "edge_index": data.edge_index, "batch": data.batch},
    ):
        found = maskhooks.LeaveOneOut(hooked, "edge").explain(form)
        assert found["score"].tolist() == pytest.approx(wanted["score"].tolist(), abs=1e-6)
    one = data.to_data_list()[0]
    for single in (one, (one.x, one.edge_index), Batch.from_data_list([one])):
        found = maskhooks.LeaveOneOut(hooked, "edge").explain(single)
        assert found["score"].tolist() == pytest.approx(wanted.select(example=0)["score"].tolist(), abs=1e-4)


def test_a_graph_by_itself_is_tried_in_copies() -> None:
    model, data = pooled(Pooled()), graph(4, BONDS)
    hooked = maskhooks.wrap(model, example=data, skip_checks=["model"])
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(len(given["x"])), with_kwargs=True
    )
    found = maskhooks.LeaveOneOut(hooked, "edge").explain(data)
    assert sizes == [4, 28, 28]
    del data.y
    alone = maskhooks.LeaveOneOut(hooked, "edge", batch_size=1).explain(data)
    assert sizes[3:] == [4] * 8
    assert found["score"].tolist() == pytest.approx(alone["score"].tolist(), abs=1e-5)

    several = three()
    handle.remove()
    wanted = maskhooks.LeaveOneOut(hooked, "edge", batch_size=1).explain(several)["score"].tolist()
    made = Data(x=several.x, edge_index=several.edge_index, batch=several.batch)  # of which no list can be made
    changed = three()
    changed.x = changed.x.clone()
    del changed._slice_dict
    for form in (several, made, changed):
        found = maskhooks.LeaveOneOut(hooked, "edge").explain(form)
        assert found["score"].tolist() == pytest.approx(wanted, abs=1e-4)


def test_a_graph_without_edges_among_others() -> None:
    data = Batch.from_data_list([graph(4, PATH), graph(2, PATH[:, :0]), graph(4, BONDS)])
    hooked = maskhooks.wrap(pooled(Pooled()), example=data)
    rows = maskhooks.Erasure(hooked, "edge", margin=0.1).explain(data)
    assert set(rows["example"].tolist()) == {0, 2}
    assert rows.metadata[1]["search"] == "0 of 0 positions: {}"
    assert len(maskhooks.LeaveOneOut(hooked, "edge").explain(data)) == 10
    assert len(maskhooks.Beam(hooked, "edge", margin=0.1).explain(data)) == 10


@pytest.mark.parametrize("disjoint", [False, True])
def test_sampled_batches(disjoint: bool) -> None:
    edges = torch.randint(9, (2, 14), generator=torch.Generator().manual_seed(2))
    (data, *_) = around_nodes(Data(x=randn(9, 3), edge_index=edges), torch.arange(4), disjoint=disjoint)
    model = pooled(Nodes())
    hooked = maskhooks.wrap(model, level="node", example=data)
    rows = maskhooks.LeaveOneOut(hooked, "edge").explain(data)
    assert len(rows) == data.num_edges
    clean, asked = without(model, lambda: model(data.x, data.edge_index), ()), data.batch_size
    for number, edge in enumerate(edges_of(data)):
        if edges_of(data).count(edge) > 1:
            continue
        masked = without(model, lambda: model(data.x, data.edge_index), [edge])
        moved = kl(clean, masked)[:asked]
        score = 1 - torch.exp(-moved if disjoint else -moved.mean()).numpy()
        mine = score[int(data.batch[edge[1]])] if disjoint else score
        assert rows["score"][number] == pytest.approx(float(mine), abs=1e-4)


def test_types_of_edges() -> None:
    model = pooled(Typed())
    data = hetero()
    hooked = maskhooks.wrap(model, example=data)
    rows = maskhooks.LeaveOneOut(hooked, "edge").explain(data)
    assert len(rows) == 9
    assert rows["score"].max() > 0
    masks = maskhooks.Erasure(hooked, "edge", margin=0.05).search(data, progress=False)
    assert masks[0].solutions


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_a_learned_baseline() -> None:
    model, data = pooled(Nodes()), graph(4, PATH)
    data.node_index = torch.tensor([3])
    hooked = maskhooks.wrap(model, level="node", example=data)
    masks = maskhooks.GraphMask(hooked, "first.message:output", recipe=maskhooks.Recipe(steps=3))
    masks.fit([data], progress=False)
    learned = masks.maskings[0].baseline
    scores = maskhooks.LeaveOneOut(hooked, "first.message:output", baseline=learned).explain(data)["score"]
    vector = learned().detach()
    assert vector.abs().max() > 0
    for number in range(3):

        def message(module: Any, inputs: Any, output: Tensor, number: int = number) -> Tensor:
            return torch.cat([output[:number], vector[None], output[number + 1 :]])

        with torch.no_grad():
            clean, handle = model(data.x, data.edge_index)[3:], model.first.register_message_forward_hook(message)
            masked = model(data.x, data.edge_index)[3:]
        handle.remove()
        moved = kl(*(torch.distributions.Categorical(logits=logits) for logits in (clean, masked)))
        assert scores[number] == pytest.approx(1 - torch.exp(-moved).item(), abs=1e-4)


def test_within_the_explainer_of_geometric() -> None:
    model = pooled(Pooled()).eval()
    data = graph(4, BONDS)
    explainer = Explainer(
        model,
        MaskAlgorithm(lambda hooked: maskhooks.LeaveOneOut(hooked, "edge")),
        explanation_type="model",
        edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "graph", "return_type": "raw"},
    )
    mask = explainer(data.x, data.edge_index).edge_mask
    rows = maskhooks.LeaveOneOut(maskhooks.wrap(model), "edge").explain(data)
    assert mask.tolist() == pytest.approx(rows["score"].tolist(), abs=1e-5)
