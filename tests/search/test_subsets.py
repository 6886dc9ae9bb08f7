"""Subsets: numbers and sets are inverse, in colexicographic order."""

from __future__ import annotations

import itertools
from math import comb

import torch

from maskhooks.search.subsets import rank, total, unrank


def test_all_sets_of_a_size_in_order() -> None:
    for positions, size in itertools.product(range(7), range(7)):
        sets = sorted(itertools.combinations(range(positions), size), key=lambda one: one[::-1])
        inside = unrank(torch.arange(total(positions, size)), positions, size)
        assert [tuple(row.nonzero()[:, 0].tolist()) for row in inside] == sets
        assert [rank(one) for one in sets] == list(range(len(sets)))


def test_one_more_position_at_the_end_adds_its_count() -> None:
    assert rank([1, 4, 9]) == rank([1, 4]) + comb(9, 3)


def test_numbers_beyond_32_bits() -> None:
    chosen = list(range(30, 45))
    assert unrank(torch.tensor([rank(chosen)]), 60, 15)[0].nonzero()[:, 0].tolist() == chosen


def test_counts() -> None:
    assert total(20) == sum(total(20, size) for size in range(21)) == 2**20
