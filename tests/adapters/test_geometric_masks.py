"""Masks on graphs: trained, tied between layers only where the edges agree, on states of nodes and from a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, SAGEConv

import maskhooks
from maskhooks.errors import ReplacementError, SettingError, UnfiredSiteWarning
from tests.adapters.geometric_models import EDGES, Nodes, Pooled, Typed, batch, graph, hetero

Unchanged = Callable[[nn.Module], nn.Module]


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
        unused = r"does not depend on conv.convs.<user___rates___film>.message:output, so"
        with pytest.warns(UnfiredSiteWarning, match=unused):
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
    with pytest.raises(
        SettingError, match=r"in the same order \(7 and 11\), for example .* GraphMask\(hooked, 'edge'\)"
    ):
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
    with pytest.raises(
        ReplacementError, match=r"second.message:output: its value has shape \[4, 4\] in the masked pass"
    ):
        masks.explain(graph())


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
    for cache in (None, "memory"):
        masks = maskhooks.DiffMask(hooked, "message", recipe=maskhooks.Recipe(steps=4))
        found.append(masks.fit([batch()], progress=False, cache=cache).explain(batch())["score"])
    assert found[0].tolist() == found[1].tolist()


def test_inputs_are_masked_as_known_from_the_states_above(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(Nodes(), example=graph())
    assert [str(site) for site in hooked.sites.tagged("input")] == ["first:input"]
    model = Pooled()
    masks = maskhooks.DiffMask(maskhooks.wrap(unchanged(model)), "input", recipe=maskhooks.Recipe(steps=2))
    rows = masks.fit([batch()], progress=False).explain(batch())
    assert sorted(set(rows["depth"])) == [0, 1]
