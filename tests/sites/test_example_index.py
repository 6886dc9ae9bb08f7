"""Rows of several examples: sums, and places within each."""

from __future__ import annotations

import torch

from maskhooks.sites.example_index import ExampleIndex


def test_sums_are_per_example_and_zero_without_rows() -> None:
    examples = ExampleIndex(torch.tensor([2, 0, 2, 0, 0]), 4)
    assert examples.sums(torch.tensor([1.0, 2, 3, 4, 5])).tolist() == [11, 0, 4, 0]


def test_places_count_within_each_example() -> None:
    assert ExampleIndex(torch.tensor([2, 0, 2, 0, 0]), 4).places().tolist() == [0, 0, 1, 1, 2]
    assert ExampleIndex(torch.empty(0, dtype=torch.long), 2).places().tolist() == []


def test_rows_example_by_example_and_back() -> None:
    mixed = ExampleIndex(torch.tensor([1, 0, 1, 0]), 3)
    rows = torch.arange(8.0).view(4, 2)
    assert mixed.in_order(rows)[:, 0].tolist() == [2, 6, 0, 4]
    assert torch.equal(mixed.back(mixed.in_order(rows)), rows)
    assert torch.equal(ExampleIndex(torch.tensor([0, 0, 2]), 3).in_order(rows[:3]), rows[:3])
