"""Layers that pool, trim, run by themselves or send messages in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch.distributions import Categorical
from torch_geometric.data import Batch
from torch_geometric.nn import SAGEConv, TopKPooling, global_add_pool

import maskhooks
from maskhooks.errors import BatchError, ModelError, NotATensorError, SiteNeverFiredError
from tests.adapters.geometric_models import EDGES, Pooled, batch, graph, randn
from tests.adapters.geometric_values import values

Unchanged = Callable[[nn.Module], nn.Module]


def test_a_layer_that_runs_by_itself() -> None:
    model = Pooled()
    hooked = maskhooks.wrap(model, call=lambda model, data: model.first(data.x, data.edge_index))
    with torch.no_grad(), hooked.tap(read="first.message:output") as tap:
        hooked(graph())
    assert len(tap.values["first.message:output"]) == 11
    with torch.no_grad(), hooked.tap(read="edge") as tap:  # what is called for a batch is a pass
        hooked(graph())
    assert len(tap.values["edge:output"]) == 7
    with pytest.raises(ModelError, match="a layer of Pooled runs by itself"), hooked.tap(read="edge"):
        model.first(graph().x, EDGES)


def test_a_message_that_is_no_row_an_edge(unchanged: Unchanged) -> None:
    class Odd(SAGEConv):
        def message(self, x_j: Tensor) -> Any:
            return x_j[:-1]

    hooked = maskhooks.wrap(unchanged(Odd(3, 4)))
    with pytest.raises(ModelError, match=r"returned a tensor \[6, 3\] for 7 edges"), hooked.tap(read="message"):
        hooked((randn(5, 3), EDGES))


def test_portions_of_several_widths() -> None:
    class Odd(SAGEConv):
        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.propagate(edge_index, x=x).sum() + self.propagate(edge_index, x=x[:, :2]).sum()

    hooked = maskhooks.wrap(Odd(3, 4))
    with (
        pytest.raises(NotATensorError, match="Address one call, such as 'message@0:output'"),
        hooked.tap(read="message"),
    ):
        hooked((randn(5, 3), EDGES))
    assert values(hooked, (randn(5, 3), EDGES), "message@1:output")[0].shape == (7, 2)


def test_a_layer_that_goes_its_own_way() -> None:
    class Odd(SAGEConv):
        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return x.new_zeros(5, 4).index_add(0, edge_index[1], self.lin_l(x)[edge_index[0]])

    hooked = maskhooks.wrap(Odd(3, 4))
    with pytest.raises(SiteNeverFiredError, match="message"), hooked.tap(read="message"):
        hooked((randn(5, 3), EDGES))


def test_pooled_nodes_are_not_taken_for_those_of_the_batch() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pool, self.second = SAGEConv(3, 4), TopKPooling(4, ratio=3), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Any:
            x, edges, _, batch, _, _ = self.pool(self.first(x, edge_index), edge_index, None, batch)
            return global_add_pool(self.second(x, edges), batch)

    torch.manual_seed(0)
    hooked = maskhooks.wrap(Pooling())
    path = graph(6, torch.tensor([[0, 1, 2, 3, 4, 5, 2, 4, 1], [1, 2, 3, 4, 5, 0, 5, 2, 4]]))
    rows = maskhooks.Random(hooked, "message").explain(path)
    assert (rows.select(site="first.message:output")["edge"] >= 0).all()
    assert (rows.select(site="second.message:output")["edge"] == -1).all()
    with pytest.raises(BatchError, match=r"second.message.*not those of the batch, as after pooling"):
        maskhooks.Random(hooked, "message").explain(Batch.from_data_list([path, path]))


def test_layers_with_the_first_nodes_of_a_sampled_graph() -> None:
    class Trimmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SAGEConv(3, 4), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.second(self.first(x, edge_index)[:3], edge_index[:, :3])

    rows = maskhooks.Random(
        maskhooks.wrap(Trimmed(), level="graph", output=lambda out: Categorical(logits=out.sum(0)[None])),
        "second.message:output",
    ).explain(graph())
    assert rows["edge"].tolist() == [0, 1, 2]


def test_names_that_a_model_has_taken() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge = SAGEConv(3, 4)
            self.edge.source = nn.Linear(1, 1)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.edge(x, edge_index)

    assert [str(site) for site in maskhooks.wrap(Taken()).sites] == ["edge:input", "edge:output"]


def test_a_network_without_the_library() -> None:
    """A site on a message module of its own."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
            sent = self.message(x[edge_index[0]])
            hidden = sent.new_zeros(len(x), 4).index_add(0, edge_index[1], sent)
            return self.last(hidden.new_zeros(int(batch.max()) + 1, 4).index_add(0, batch, hidden))

    hooked = maskhooks.wrap(
        Own(),
        sites={"message:output": "edge feature -> edge"},
        output=lambda out: torch.distributions.Categorical(logits=out),
        example_index=lambda given: given["batch"][given["edge_index"][1]],
        edges=lambda given: {"source": given["edge_index"][0], "target": given["edge_index"][1]},
    )
    data = batch()
    rows = maskhooks.Random(hooked, "message:output").explain(
        {"x": data.x, "edge_index": data.edge_index, "batch": data.batch}
    )
    assert rows["example"].tolist() == data.batch[data.edge_index[1]].tolist()
    assert rows["source"].tolist() == data.edge_index[0].tolist()
