"""Both directions of an edge as one unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from maskhooks_geometric.algorithm import MaskAlgorithm
from torch_geometric.data import Batch
from torch_geometric.explain import Explainer
from torch_geometric.nn import TAGConv, global_add_pool

import maskhooks
from maskhooks.errors import BatchError, SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import masked_pass
from maskhooks.seeds import generator
from tests.adapters.geometric_models import Nodes, Pooled, Relational, Typed, graph, hetero, randn

Unchanged = Callable[[nn.Module], nn.Module]

# A ring of four in both directions, and 3 -> 0 in one more way than 0 -> 3.
RING = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0, 3], [1, 0, 2, 1, 3, 2, 0, 3, 0]])
ONE_WAY = torch.tensor([[0, 1], [1, 2]])


def rings() -> Batch:
    """The ring, edges in one direction, and the ring with its edges in another order."""
    return Batch.from_data_list([graph(4, RING), graph(3, ONE_WAY), graph(5, RING.flip(1))])


def numbers(hooked: Hooked, data: Any, address: str) -> tuple[Mapping[str, Tensor], Tensor | None]:
    """What the rows of a site are, and their units."""
    (site,) = hooked.find(address)
    clean = clean_pass(hooked, data, [site])
    columns = hooked.task.edges(site, clean.batch, clean.values)
    assert columns is not None
    return columns, hooked.task.units(site, clean.batch, clean.values)


def pairs(explanation: Explanation) -> dict[Any, set[float]]:
    """The scores of the edges between two nodes of an example, in a layer."""
    found: dict[Any, set[float]] = {}
    for row in explanation.to_pandas().itertuples():
        ends = tuple(sorted((row.source, row.target)))
        found.setdefault((row.example, row.site, ends), set()).add(row.score)
    return found


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("settings", [{}, {"tied": True}, {"amortized": False}, {"gate": "hard-concrete-rounded"}])
def test_both_directions_have_one_score(settings: Any, unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Nodes()), example=rings(), units="undirected")
    masks = maskhooks.GraphMask(hooked, "first.message:output", recipe=maskhooks.Recipe(steps=3), **settings)
    if masks.amortized:
        masks.fit([rings()], [rings()], progress=False)
    rows = masks.explain(rings())
    assert len(rows) == 20
    found = pairs(rows)
    twice = {key for key, scores in found.items() if len(scores) > 1}
    assert twice <= {(0, "first.message:output", (0, 3)), (2, "first.message:output", (0, 3))}
    assert len({score for scores in found.values() for score in scores}) > 3 or not masks.amortized
    assert rows.provenance["units"] == "undirected"


def test_a_pair_is_drawn_and_counted_once() -> None:
    hooked = maskhooks.wrap(Pooled(), example=rings(), units="undirected")
    masks = maskhooks.GraphMask(hooked, recipe=maskhooks.Recipe(steps=1)).fit([rings()], progress=False)
    clean = clean_pass(hooked, rings(), masks.reads)
    masked, _ = masked_pass(clean, masks.groups[0], generator(3))
    first, second = masked.sample.split(len(masked.sample) // 2)
    assert torch.equal(first[:8:2], first[1:8:2])
    assert len(first[:8].unique()) == 4
    assert not torch.equal(first, second)
    # 5 and 2 and 5 between two nodes, and what these layers send each node
    assert masked.total(torch.ones_like(masked.sample)).tolist() == [2 * (5 + 4), 2 * (2 + 3), 2 * (5 + 5)]


def test_edges_in_every_layer_at_once(unchanged: Unchanged) -> None:
    hooked = maskhooks.wrap(unchanged(Pooled()), units="undirected")
    found = pairs(maskhooks.Random(hooked, "edge").explain(rings()))
    assert [len(found[0, "edge:output", ends]) for ends in ((0, 1), (1, 2), (2, 3), (0, 3))] == [1, 1, 1, 2]
    assert len(set().union(*found.values())) == 5 + 2 + 5


def test_directions_are_paired_within_one_call_and_relation() -> None:
    hops = maskhooks.wrap(TAGConv(3, 2, K=2), units="undirected")
    columns, found = numbers(hops, graph(4, RING), "message:output")
    assert found is not None
    assert len(found) == 2 * 9
    assert not set(found[:8].tolist()) & set(found[9:17].tolist())
    assert torch.equal(found[0:8:2], found[1:8:2])

    related = graph(4, RING, edge_type=torch.tensor([0, 0, 1, 2, 1, 1, 2, 2, 0]))
    columns, found = numbers(maskhooks.wrap(Relational(), units="undirected"), related, "conv.message:output")
    assert found is not None
    keys = [tuple(row) for row in torch.stack([*columns.values()], 1).tolist()]
    mates = [(a[:2], b[:2]) for n, a in enumerate(keys) for m, b in enumerate(keys) if n < m and found[n] == found[m]]
    assert sorted(mates) == [((0, 1), (1, 0)), ((2, 3), (3, 2)), ((3, 0), (0, 3))]


def test_types_of_nodes_keep_their_numbers_apart() -> None:
    """A user's 1 and a film's 0 are no pair with a user's 0 and a film's 1."""
    data = hetero()
    data["user", "rates", "film"].edge_index = torch.tensor([[0, 1, 3, 3], [1, 0, 1, 2]])
    hooked = maskhooks.wrap(Typed(), units="undirected")
    for relation, units in ((("user", "rates", "film"), 4), (("user", "knows", "user"), 1)):
        name = f"conv.convs.<{'___'.join(relation)}>.message:output"
        _, found = numbers(hooked, data, name)
        assert found is not None
        assert len(found.unique()) == units
    _, every = numbers(hooked, data, "edge")
    assert every is not None
    assert len(every) - len(every.unique()) == 1


def test_states_of_nodes_are_by_themselves() -> None:
    hooked = maskhooks.wrap(Pooled(), units="undirected")
    (site,) = hooked.find("first:output")
    assert clean_pass(hooked, rings(), [site]).places[site].units is None


def test_a_network_of_ones_own() -> None:
    """`edges` says which positions go between the same two."""

    def ends(data: Any) -> dict[str, Tensor]:
        within = data.edge_index - data.ptr[data.batch[data.edge_index]]
        return {"source": within[0], "target": within[1]}

    def sent(model: nn.Module, data: Any) -> Tensor:
        return global_add_pool(model(data.x[data.edge_index[0]]), data.batch[data.edge_index[1]])

    settings: Any = {
        "sites": {"0:output": "edge feature -> edge"},
        "call": sent,
        "output": lambda outputs: torch.distributions.Categorical(logits=outputs),
        "example_index": lambda data: data.batch[data.edge_index[1]],
    }
    model = nn.Sequential(nn.Linear(3, 2))
    own = maskhooks.wrap(model, edges=ends, units="undirected", **settings)
    found = pairs(maskhooks.Random(own, "0:output").explain(rings()))
    assert [len(found[2, "0:output", ends]) for ends in ((0, 1), (1, 2), (2, 3), (0, 3))] == [1, 1, 1, 2]
    with pytest.raises(BatchError, match="units='undirected': the task 'function' does not know"):
        maskhooks.Random(maskhooks.wrap(model, units="undirected", **settings), "0:output").explain(rings())


def test_no_other_word_is_known() -> None:
    with pytest.raises(SettingError, match=r"units='words' is not known. Give 'undirected', or a function"):
        maskhooks.wrap(Pooled(), units="words")


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_edge_masks_of_pyg_and_saved_masks(tmp_path: Path) -> None:
    model = Pooled()
    hooked = maskhooks.wrap(model, example=rings(), units="undirected")
    masks = maskhooks.GraphMask(hooked, recipe=maskhooks.Recipe(steps=2)).fit([rings()], progress=False)
    masks.save(tmp_path / "masks")
    loaded = maskhooks.load(tmp_path / "masks", model)
    assert loaded.hooked.task.unit_name == "undirected"
    config = {"mode": "multiclass_classification", "task_level": "graph", "return_type": "raw"}
    explainer = Explainer(
        model, MaskAlgorithm(loaded), explanation_type="model", edge_mask_type="object", model_config=config
    )
    mask = explainer(randn(4, 3), RING).edge_mask
    assert torch.equal(mask[0:8:2], mask[1:8:2])
    assert len(mask.unique()) > 2
