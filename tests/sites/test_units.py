"""Units: positions that share a gate."""

from __future__ import annotations

import pytest
import torch

from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.units import Units, undirected

TOKENS = Pattern("batch token hidden -> batch token")
NUMBERS = torch.tensor([[7, 7, 3, 7, 1], [0, 1, 2, 2, 2]])


def test_units_lie_anywhere_in_an_example_and_none_spans_two() -> None:
    units = Units.of(NUMBERS)
    assert units.first.tolist() == [[0, 0, 2, 0, 4], [0, 1, 2, 2, 2]]
    assert units.unit_heads.tolist() == [[True, False, True, False, True], [True, True, True, False, False]]


def test_the_first_position_speaks_for_its_unit() -> None:
    gates = torch.arange(10.0).view(2, 5)
    assert Units.of(NUMBERS).shared(gates, TOKENS)[0].tolist() == [0, 0, 2, 0, 4]


def test_the_mean_over_a_unit_gets_gradients_from_all_of_it() -> None:
    gates = torch.arange(5.0).repeat(2, 1).requires_grad_()
    mean = Units.of(NUMBERS).mean(gates, TOKENS)
    assert torch.allclose(mean[0], torch.tensor([4 / 3, 4 / 3, 2, 4 / 3, 4]))
    mean[0, 1].backward()
    assert torch.allclose(gates.grad[0], torch.tensor([1 / 3, 1 / 3, 0, 1 / 3, 0]))


def test_groups_keep_to_themselves_wherever_their_axis_stands() -> None:
    pattern = Pattern("batch (head dim) token -> batch head token", {"head": 2})
    gates = torch.arange(20.0).view(2, 2, 5)
    shared = Units.of(NUMBERS).shared(gates, pattern)
    assert shared[0].tolist() == [[0, 0, 2, 0, 4], [5, 5, 7, 5, 9]]


def test_several_position_axes_count_through() -> None:
    units = Units.of(torch.tensor([[[0, 0], [1, 0]]]))
    assert units.unit_heads.tolist() == [[[True, False], [True, False]]]
    pattern = Pattern("batch channel height width -> batch height width")
    assert units.shared(torch.arange(4.0).view(1, 2, 2), pattern).flatten().tolist() == [0, 0, 2, 0]


def test_a_batch_without_positions() -> None:
    assert Units.of(torch.zeros(2, 0, dtype=torch.long)).unit_heads.shape == (2, 0)


def test_rows_of_many_examples() -> None:
    """As with edges of several graphs: rows of one example are gated together, wherever they stand."""
    pattern = Pattern("edge (head feature) -> edge head", {"head": 2})
    units = Units.of(torch.tensor([5, 5, 5, 2, 5]), ExampleIndex(torch.tensor([0, 1, 0, 0, 1]), 2))
    assert units.unit_heads.tolist() == [True, True, False, True, False]
    gates = torch.arange(10.0).view(5, 2)
    assert units.shared(gates, pattern)[:, 0].tolist() == [0, 2, 0, 6, 2]
    assert units.mean(gates, pattern)[:, 1].tolist() == [3, 6, 3, 7, 6]
    assert Units.of(torch.zeros(0).long(), ExampleIndex(torch.zeros(0).long(), 2)).unit_heads.shape == (0,)


def test_edges_in_both_directions() -> None:
    source, target = torch.tensor([[0, 1, 2, 0, 1, 3, 0, 1], [1, 0, 0, 1, 0, 3, 1, 2]])
    found = undirected(source, target)
    assert found[0] == found[1]
    assert found[3] == found[4]  # the second time
    assert len(set(found.tolist())) == 6
    apart = undirected(source, target, torch.tensor([0, 1, 0, 1, 0, 0, 0, 0]))
    assert apart[0] == apart[4]
    assert apart[1] == apart[3]
    assert undirected(*torch.zeros(2, 0).long()).shape == (0,)


def test_edges_between_nodes_of_large_numbers() -> None:
    source, target = torch.tensor([[0, 2**40, 7, 2**40], [2**40, 0, 2**40, 7]])
    found = undirected(source, target, torch.tensor([2**40, 2**40, 0, 0]))
    assert found[0] == found[1] != found[2] == found[3]
    assert int(found.max()) < 4
    assert Units.of(found, ExampleIndex(torch.tensor([0, 0, 1, 1]), 2)).first.tolist() == [[0, 0, 2, 2]]


@pytest.mark.parametrize("nodes", [12, 90, 20_000])  # nearby nodes are found in a table, far ones by a sort
def test_edges_of_any_graph_in_both_directions(nodes: int) -> None:
    generator = torch.Generator().manual_seed(nodes)
    edges = torch.randint(nodes, (2, 40), generator=generator).unique(dim=1)
    source, target = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
    for apart in ([], [torch.zeros_like(source)], [(source + target) % 2]):
        columns = zip(source.tolist(), target.tolist(), *(column.tolist() for column in apart), strict=True)
        wanted = [(min(u, v), max(u, v), *rest) for u, v, *rest in columns]
        found = undirected(source, target, *apart).tolist()
        assert len(set(found)) == len(set(wanted)) == len(set(zip(found, wanted, strict=True)))
