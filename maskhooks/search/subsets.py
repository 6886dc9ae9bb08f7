"""Subsets: all sets of so many positions out of n, numbered.

Sets of one size come in colexicographic order, in which the sets of the first positions come first. The number of
{t_1 < ... < t_k} is comb(t_1, 1) + ... + comb(t_k, k), so that a set with one more position at its end, t, has the
number of the old one, and comb(t, k + 1) more.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def total(positions: int, size: int | None = None) -> int:
    """How many sets there are, of one size or of all."""
    return 2**positions if size is None else comb(positions, size)


def unrank(numbers: Int[Tensor, " set"], positions: int, size: int) -> Bool[Tensor, "set position"]:
    """The sets of a size with these numbers."""
    left = numbers.to(torch.int64).clone()
    inside = torch.zeros(len(left), positions, dtype=torch.bool)
    wanted = torch.full_like(left, size)
    counts = torch.tensor([[comb(at, chosen) for chosen in range(size + 1)] for at in range(positions)])
    for at in range(positions - 1, -1, -1):
        below = counts[at][wanted]
        chosen = (wanted > 0) & (left >= below)
        left = torch.where(chosen, left - below, left)
        wanted = wanted - chosen.long()
        inside[:, at] = chosen
    return inside


def rank(chosen: Sequence[int]) -> int:
    """The number of a set among those of its size."""
    return sum(comb(at, index + 1) for index, at in enumerate(sorted(chosen)))
