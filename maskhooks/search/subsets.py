"""Subsets: rank all sets of k positions out of n.

Sets of one size are in colexicographic order: those of the first positions come first. The rank of {t_1 < ... < t_k}
is comb(t_1, 1) + ... + comb(t_k, k), so appending a position t adds comb(t, k + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def total(positions: int, size: int | None = None) -> int:
    """Return the number of sets, of one size or of all sizes."""
    return 2**positions if size is None else comb(positions, size)


def unrank(numbers: Int[Tensor, " set"], positions: int, size: int) -> Bool[Tensor, "set position"]:
    """Return the sets of a size with these ranks."""
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
    """Return the rank of a set among those of its size."""
    return sum(comb(at, index + 1) for index, at in enumerate(sorted(chosen)))
