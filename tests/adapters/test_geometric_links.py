"""Predictions for links, from an encoder and a decoder, explained end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

pytest.importorskip("torch_geometric")

from maskhooks_geometric.algorithm import MaskAlgorithm
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.explain import Explainer
from torch_geometric.nn import GAE, GraphSAGE, SAGEConv
from torch_geometric.utils import k_hop_subgraph

import maskhooks
from maskhooks.errors import BatchError
from maskhooks.model.outputs import Positions
from maskhooks.passes.clean import clean_pass
from tests.adapters.geometric_models import Rates, graph, hetero, randn

Unchanged = Callable[[nn.Module], nn.Module]

# A ring of six, and a second one that no edge joins to it.
RINGS = torch.tensor([[*range(12)], [1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 11, 6]])
PAIRS = torch.tensor([[0, 7, 3], [2, 9, 8]])


class Decoded(nn.Module):
    """States of both ends, and a number for each pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = SAGEConv(3, 6), SAGEConv(6, 6)
        self.decoder = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor, edge_index: Tensor, edge_label_index: Tensor) -> Tensor:
        states = self.second(self.first(x, edge_index).tanh(), edge_index).tanh()
        predicted: Tensor = self.decoder(states[edge_label_index].transpose(0, 1).flatten(1))
        return predicted


def rings(**more: Any) -> Data:
    return Data(x=randn(12, 3), edge_index=RINGS, edge_label_index=PAIRS, edge_label=torch.tensor([1.0, 0, 1]), **more)


def around(pair: int) -> Data:
    """What two layers see of a pair's ends; rows name nodes and edges as in the whole graph."""
    whole = rings()
    nodes, edges, ends, kept = k_hop_subgraph(PAIRS[:, pair], 2, RINGS, relabel_nodes=True)
    return Data(
        x=whole.x[nodes], edge_index=edges, edge_label_index=ends.reshape(2, 1), edge_label=whole.edge_label[[pair]],
        n_id=nodes, e_id=kept.nonzero()[:, 0],
    )  # fmt: skip


def test_a_pair_is_an_example_with_what_lies_around_it(unchanged: Unchanged) -> None:
    """Each has an output, a prediction, a label and edges of its own, that are named as in the whole graph."""
    model = unchanged(Decoded())
    batch = Batch.from_data_list([around(pair) for pair in range(3)])
    hooked = maskhooks.wrap(model, example=batch)
    with torch.no_grad():
        wanted = model.eval()(rings().x, RINGS, PAIRS)[:, 0]
        model.train()
    found = clean_pass(hooked, batch, []).outputs
    assert isinstance(found, Bernoulli)
    assert torch.allclose(found.logits, wanted, atol=1e-6)
    rows = maskhooks.Random(hooked, "first.message:output").explain(batch)
    assert [one["target"] for one in rows.metadata.values()] == ["1", "0", "1"]
    assert [one["prediction"] for one in rows.metadata.values()] == [str(int(logit > 0)) for logit in wanted]
    for example, needed in enumerate(({4, 5, 0, 1}, {11, 6, 7, 8}, {1, 2, 6, 7})):
        mine = rows.select(example=example)
        assert set(mine["source"]) >= needed
        assert set(mine["source"]) <= (set(range(6)) if example == 0 else set(range(6, 12)) | set(range(6)))
        ends = RINGS[:, mine["edge"].tolist()]
        assert ends.tolist() == [mine["source"].tolist(), mine["target"].tolist()]


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_masks_of_pairs_are_trained(unchanged: Unchanged) -> None:
    model = Decoded()
    hooked = maskhooks.wrap(unchanged(model), example=around(0))
    batch = Batch.from_data_list([around(pair) for pair in range(3)])
    recipe = dataclasses.replace(maskhooks.Recipe.named("graph"), steps=30)
    masks = maskhooks.GraphMask(hooked, margin=0.01, recipe=recipe).fit([batch], [batch], progress=False)
    rows = masks.explain(batch)
    assert sorted(set(rows["example"].tolist())) == [0, 1, 2]
    assert 0 < rows["score"].min() < rows["score"].max() <= 1


def test_all_pairs_of_a_graph_are_one_example() -> None:
    """Which edges do they need together? Those that count may be named."""
    hooked = maskhooks.wrap(Decoded().eval())
    found = clean_pass(hooked, rings(), []).outputs
    assert isinstance(found, Positions)
    assert found.chosen.shape == (1, 3)
    one = clean_pass(hooked, rings(link_index=torch.tensor([1])), []).outputs
    assert torch.allclose(one.logits, found.distribution.logits[0, [1]])


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_edges_that_a_pair_cannot_see_are_dropped() -> None:
    model = Decoded()
    model.decoder[2].weight.data *= 30  # a prediction that its edges matter to
    explainer = maskhooks.DiffMask(
        maskhooks.wrap(model), "edge", amortized=False, margin=0.01, recipe=maskhooks.Recipe(steps=150)
    )
    rows = explainer.explain(rings(link_index=torch.tensor([0])))
    assert rows["score"][6:].max() < 0.5
    assert rows["score"][6:].max() < rows["score"][[4, 5, 0, 1]].max()


def pairs_of(data: Any) -> Tensor:
    """Of a batch that lists them below each other, within each graph, under a name of its own."""
    start = data.ptr[:-1].repeat_interleave(torch.tensor([len(one) for one in data.asked]))
    return torch.cat([torch.as_tensor(one) for one in data.asked]).t() + start


def test_pairs_under_another_name() -> None:
    class Asked(Decoded):
        def forward(self, data: Any) -> Tensor:  # type: ignore[override]
            return super().forward(data.x, data.edge_index, pairs_of(data))

    batch = Batch.from_data_list([graph(asked=[[0, 1], [2, 4]]), graph(asked=[[3, 1]])])
    batch.y = torch.tensor([0, 1])
    both = clean_pass(maskhooks.wrap(Asked().eval(), pairs=pairs_of), batch, []).outputs
    assert both.chosen.tolist() == [[True, True], [True, False]]
    some = maskhooks.wrap(Asked().eval(), pairs=pairs_of, index=lambda data: torch.tensor([1, 2]))
    found = clean_pass(some, batch, []).outputs
    assert found.logits.tolist() == both.distribution.logits[[0, 1], [1, 0]].tolist()
    wrong = maskhooks.wrap(Asked().eval(), pairs=lambda data: pairs_of(data).t())
    with pytest.raises(BatchError, match=r"pairs of nodes .* have shape \[3, 2\] .* Give two rows"):
        clean_pass(wrong, batch, [])


def rated(pairs: list[list[int]], labels: list[float]) -> HeteroData:
    data = hetero()
    data["user", "rates", "film"].edge_label_index = torch.tensor(pairs)
    data["user", "rates", "film"].edge_label = torch.tensor(labels)
    return data


def test_links_between_types_of_nodes(unchanged: Unchanged) -> None:
    model = unchanged(Rates())
    hooked = maskhooks.wrap(model)
    batch = Batch.from_data_list([rated([[3], [2]], [1.0]), rated([[0], [1]], [0.0])])
    found = clean_pass(hooked, batch, []).outputs
    with torch.no_grad():
        alone = torch.cat([hooked(rated([[user], [film]], [1.0])) for user, film in ((3, 2), (0, 1))])
    assert torch.allclose(found.logits, alone, atol=1e-6)
    rows = maskhooks.Random(hooked, "message").explain(batch)
    assert [one["target"] for one in rows.metadata.values()] == ["1", "0"]
    assert sorted(set(rows["example"].tolist())) == [0, 1]
    several = clean_pass(hooked, Batch.from_data_list([rated([[3, 1], [2, 0]], [1, 0])] * 2), []).outputs
    assert several.chosen.shape == (2, 2)


def test_an_encoder_and_a_decoder_that_forward_does_not_know(unchanged: Unchanged) -> None:
    """As PyTorch Geometric's own autoencoder is used; edges in every layer at once are those of what `call` runs."""
    model = unchanged(GAE(GraphSAGE(3, 8, num_layers=2)))

    def call(model: Any, data: Any) -> Tensor:
        decoded: Tensor = model.decode(model.encode(data.x, data.edge_index), data.edge_label_index, sigmoid=False)
        return decoded

    batch = Batch.from_data_list([around(pair) for pair in range(3)])
    hooked = maskhooks.wrap(model, call=call)
    for site in ("message", "edge"):
        rows = maskhooks.Random(hooked, site).explain(batch)
        assert len(rows) == batch.num_edges * (2 if site == "message" else 1)
        assert {"prediction", "target"} <= rows.metadata[0].keys()
    closed = torch.zeros_like
    with torch.no_grad(), hooked.tap(replace={"edge:output": closed}):
        without = hooked(batch)
    alone = batch.clone()
    alone.edge_index = batch.edge_index[:, :0]
    with torch.no_grad():
        assert torch.allclose(without, hooked(alone), atol=1e-6)


def test_within_pyg() -> None:
    model, data = Decoded().eval(), rings()
    explainer = Explainer(
        model,
        MaskAlgorithm(lambda hooked: maskhooks.Random(hooked, "message")),
        explanation_type="model",
        edge_mask_type="object",
        model_config={"mode": "binary_classification", "task_level": "edge", "return_type": "raw"},
    )
    found = explainer(data.x, data.edge_index, edge_label_index=PAIRS, index=1)
    assert found.edge_mask.shape == (12,)
