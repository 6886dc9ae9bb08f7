"""Batches that are no graphs, edges and options that do not fit: each refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from maskhooks_geometric.task import GraphTask
from torch_geometric.data import Batch, Data

import maskhooks
from maskhooks.errors import BatchError, NonFiniteError, SettingError, UnknownDistributionError
from tests.adapters.geometric_models import EDGES, Links, Nodes, Pooled, batch, graph, randn
from tests.adapters.geometric_values import outputs

Unchanged = Callable[[nn.Module], nn.Module]


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
        (EDGES + 3, "has 7 as a (source|target), and there are 5 nodes"),
        (EDGES - 1, "has -1"),
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
        with pytest.raises(BatchError, match=r"edge_index has shape .* two rows of integers"):
            hooked((randn(5, 3), edges))
    with pytest.raises(BatchError, match="edge_index holds 7 edges, and edge_attr has 5 rows"):
        hooked(graph(edge_attr=randn(5, 2)))


def test_mixed_devices(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Pooled()))
    for name, data in (
        ("edge_index", graph(edges=EDGES.to("meta"))),
        ("edge_attr", graph(edge_attr=randn(7).to("meta"))),
    ):
        with pytest.raises(BatchError, match=rf"{name} is on meta, and the model on cpu. Move the batch"):
            hooked(data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([graph(), graph()], r"a list of 2 graphs. Combine them: .*from_data_list"),
        (("x", randn(5, 3)), r"begins with 'x': a single Data or Batch was given where a loader"),
        (graph(batch=torch.zeros(4, dtype=torch.long)), r"has 4 graph indices for 5 nodes"),
        (graph(node_index=torch.tensor([5])), r"node_index, .* got \[5\] for 5 predictions"),
        (graph(node_index=torch.tensor([0.5])), r"node_index, .* got \[0.5\]"),
        (graph(node_index=torch.tensor([True])), r"node_index, .* got 1 bools"),
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


def test_what_cannot_be_known() -> None:
    model = Pooled()
    hooked = maskhooks.wrap(model)
    with pytest.raises(BatchError, match="needs edge_index, which the batch does not hold"):
        hooked(Data(x=randn(5, 3)))
    with pytest.raises(BatchError, match="level='edge' is not one of node, link, graph"):
        maskhooks.wrap(model, level="edge")
    with pytest.raises(BatchError, match="there are 5 predictions for 1 graphs"):
        outputs(Nodes(), graph(), level="graph")
    with pytest.raises(BatchError, match="predicts 2 rows, and the batch holds 1 graphs of 5 nodes"):
        outputs(nn.Sequential(), graph(), call=lambda *_: randn(2, 3), task=GraphTask())
    with pytest.raises(UnknownDistributionError, match="no binary labels to say that these are logits"):
        outputs(Links(), graph(edge_label_index=EDGES, edge_label=randn(7)))
    data = batch()
    data.batch = None
    with pytest.raises((BatchError, SettingError)):
        maskhooks.Random(hooked, "message").explain(data)
