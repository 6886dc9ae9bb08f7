"""One weight for each edge: it scales the edge's messages in all layers, hops and uses at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.nn import GCNConv, RGCNConv, SAGEConv, TAGConv

import maskhooks
from maskhooks.errors import SettingError
from maskhooks.hooks.frozen import frozen
from tests.adapters.geometric_models import EDGES, TYPES, Nodes, Pooled, Relational, batch, graph, randn
from tests.adapters.geometric_values import pairs, values
from tests.conftest import same_bits

Unchanged = Callable[[nn.Module], nn.Module]


def test_an_edge_in_every_layer_at_once(unchanged: Unchanged) -> None:
    """Its weight scales its messages in all layers, whatever self-loops these add; open it changes no bit."""
    model = unchanged(Pooled())
    hooked, data = maskhooks.wrap(model, example=graph()), graph()
    (site,) = hooked.sites.tagged("edge")
    with torch.no_grad(), frozen(model):
        usual = hooked(data)
    with torch.no_grad():
        reads = [site, "edge_ends:output", "edge_source:output"]
        with hooked.tap(read=reads, replace={site: torch.clone}) as tap:
            assert same_bits(hooked(data), usual)
        assert torch.equal(tap.values[site], torch.ones(7, 1))
        assert pairs(tap.values["edge_ends:output"]) == pairs(EDGES.t())
        assert torch.equal(tap.values["edge_source:output"], data.x[EDGES[0]])
        for edge in range(7):
            weight = torch.ones(7, 1)
            weight[edge] = 0
            with hooked.tap(replace={site: lambda value, weight=weight: weight}):
                output = hooked(data)
            gcn = {3: 9}.get(edge, edge if edge < 3 else edge - 1)  # the self-loop at 3 comes after the others
            with hooked.tap(replace={f"{layer}.message:output": zero(gcn) for layer in ("first", "second")}):
                assert torch.equal(hooked(data), output)
            assert not torch.equal(output, usual)


def zero(row: int) -> Callable[[Tensor], Tensor]:
    return lambda value: torch.where(torch.arange(len(value))[:, None] == row, 0, value)


def portioned(row: int) -> Callable[[Tensor], Tensor]:
    """The same for a value that comes in portions."""
    seen: list[int] = []

    def replaced(part: Tensor) -> Tensor:
        begin = sum(seen)
        seen.append(len(part))
        return zero(row - begin)(part)

    return replaced


@pytest.mark.parametrize("amortized", [True, False])
def test_edges_of_a_batch_are_explained(amortized: bool, unchanged: Unchanged) -> None:
    model, data = Pooled(), batch()
    hooked = maskhooks.wrap(unchanged(model))
    explainer = maskhooks.DiffMask(hooked, "edge", recipe=maskhooks.Recipe(steps=4), amortized=amortized)
    if amortized:
        explainer.fit([data], progress=False)
    rows = explainer.explain(data)
    assert len(rows) == data.num_edges
    assert rows["example"].tolist() == data.batch[data.edge_index[0]].tolist()
    assert rows["position"].tolist() == rows["edge"].tolist()
    with pytest.raises(SettingError, match="no baseline can be learned"):
        maskhooks.DiffMask(hooked, "edge", baseline="learned")


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, unchanged: Unchanged) -> None:
    model, data = Pooled().to(dtype), graph()
    data.x = data.x.to(dtype)
    hooked = maskhooks.wrap(unchanged(model))
    for site, rows in (("first.message:output", 11), ("edge", 7)):
        masks = maskhooks.DiffMask(hooked, site, amortized=False, recipe=maskhooks.Recipe(steps=2))
        assert len(masks.explain(data)) == rows


def test_lists_of_edges_between_states_of_several_widths(unchanged: Unchanged) -> None:
    """Layers with edges of their own, as of types of nodes or of nearest neighbours, in one `edge`."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(3, 6), SAGEConv(6, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            hidden: Tensor = self.second(self.first(x, edge_index), edge_index[:, [0, 2, 4]].flip(0))
            return hidden

    hooked = maskhooks.wrap(unchanged(Two()), example=graph())
    found = values(hooked, graph(), "edge_source:output", "edge:output")
    assert [list(value.shape) for value in found] == [[10, 6], [10, 1]]
    assert torch.equal(found[0][:7, :3], graph().x[EDGES[0]])
    assert not found[0][:7, 3:].any()
    assert found[0][7:].all()
    rows = maskhooks.GraphMask(hooked, "edge", recipe=maskhooks.Recipe(steps=2)).fit([graph()], progress=False)
    assert rows.explain(graph())["edge"].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1]


def test_one_weight_whatever_the_flow_and_whether_relations_are_told_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.against = SAGEConv(3, 4), GCNConv(4, 4, flow="target_to_source")
            self.typed = RGCNConv(4, 2, num_relations=3)

        def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Any:
            return self.typed(self.against(self.plain(x, edge_index), edge_index), edge_index, edge_type)

    model, data = Mixed().eval(), graph(edge_type=TYPES)
    hooked = maskhooks.wrap(model)
    messages = ["plain.message:output", "against.message:output", "typed.message:output"]
    numbers = {site: maskhooks.Random(hooked, site).explain(data)["edge"] for site in messages}
    assert maskhooks.Random(hooked, "edge").explain(data)["edge"].tolist() == list(range(7))
    for edge in (0, 2, 4, 6):
        places = {site: int(np.flatnonzero(rows == edge)[0]) for site, rows in numbers.items()}
        by_hand = {site: portioned(row) if "typed" in site else zero(row) for site, row in places.items()}
        with torch.no_grad(), hooked.tap(replace=by_hand):
            wanted = hooked(data)
        with torch.no_grad(), hooked.tap(replace={"edge": zero(edge)}):
            assert torch.allclose(hooked(data), wanted)


def test_edges_that_a_model_draws_do_not_take_the_numbers_of_given_ones() -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SAGEConv(3, 4), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.second(self.first(x, edge_index[:, :3].flip(1)), edge_index)

    rows = maskhooks.Random(maskhooks.wrap(Drawn().eval(), example=graph()), "edge").explain(graph())
    assert rows["edge"].tolist() == [2, 1, 0, *range(7)]


@pytest.mark.parametrize("made", [lambda: TAGConv(3, 4, K=3), Relational, Nodes])
def test_one_weight_for_many_hops_relations_and_uses(made: Callable[[], nn.Module]) -> None:
    model = made()
    given: Any = (randn(5, 3), EDGES, TYPES)
    if not isinstance(model, Relational):
        given = given[:2]
    hooked = maskhooks.wrap(model)
    with torch.no_grad():
        with hooked.tap(read="edge", replace={"edge": torch.zeros_like}) as tap:
            closed = hooked(given)
        with hooked.tap(replace={"message": torch.zeros_like}):
            assert torch.equal(hooked(given), closed)
    assert tap.values["edge:output"].shape == (7, 1)
