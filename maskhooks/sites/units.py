"""Units: positions that are gated together, such as the pieces of a word."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.pattern import Pattern

_TABLE = 64  # table entries per edge; up to here a table is faster than a sort


@dataclass(frozen=True)
class Units:
    """Which positions of an example belong together.

    Attributes:
        first: for each position, the index of its unit's first position among all positions of its example, or of all
            examples if the first axis is not the batch axis.
        shape: the sizes of the position axes, the batch first.
    """

    first: Int[Tensor, "batch place"]
    shape: Sequence[int]

    @classmethod
    def of(cls, numbers: Int[Tensor, "batch *positions"], example_index: ExampleIndex | None = None) -> Units:
        """Build units from one number per position: equal numbers within an example form a unit.

        Args:
            example_index: the example index of each row, if the first axis is not the batch axis.
        """
        rows = numbers.reshape(len(numbers), math.prod(numbers.shape[1:]))
        low, high = (int(end) for end in rows.aminmax()) if rows.numel() else (0, 0)
        own, width = rows - low if low else rows, high - low + 1
        example = torch.arange(len(rows), device=rows.device) if example_index is None else example_index.index
        unit = own
        if example_index is None or not _apart(own, width, example):
            _, unit = torch.unique(own + width * example[:, None], return_inverse=True)
        if example_index is not None:
            rows, unit = rows.reshape(1, -1), unit.reshape(1, -1)
        places = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        first = places.new_full((rows.numel(),), rows.shape[1])
        unit = unit.flatten()
        first = first.scatter_reduce(0, unit, places.flatten(), "amin").index_select(0, unit)
        return cls(first.view_as(places), tuple(numbers.shape))

    @property
    def unit_heads(self) -> Bool[Tensor, "batch *positions"]:
        """Whether a position is the first of its unit."""
        places = torch.arange(self.first.shape[1], device=self.first.device)
        return (self.first == places).view(*self.shape)

    def shared(self, gates: Float[Tensor, "*gated"], pattern: Pattern) -> Float[Tensor, "*gated"]:
        """Return for every gate the gate of its unit's first position.

        Args:
            gates: one number per gate, over the gated axes of the pattern.
        """
        return self._over(lambda rows, index: rows.gather(1, index), gates, pattern)

    def mean(self, gates: Float[Tensor, "*gated"], pattern: Pattern) -> Float[Tensor, "*gated"]:
        """Return for every gate the mean over its unit; see `shared`."""
        return self._over(_mean, gates, pattern)

    def _over(
        self, function: Callable[[Tensor, Tensor], Tensor], gates: Float[Tensor, "*gated"], pattern: Pattern
    ) -> Float[Tensor, "*gated"]:
        """Apply a function to rows `batch place group`, with the place of each unit's first one as an index."""
        index = self.first.to(gates.device)[..., None]
        if not pattern.groups:
            return function(gates.reshape(index.shape), index).view_as(gates)
        gated, positions = " ".join(pattern.gated), " ".join(pattern.positions)
        arrow = f"{positions} ({' '.join(pattern.groups)})"
        behind = einops.rearrange(gates, f"{gated} -> {arrow}")
        rows = behind.reshape(*self.first.shape, behind.shape[-1])
        found = function(rows, index.expand_as(rows)).view_as(behind)
        groups = {axis: pattern.sizes[axis] for axis in pattern.groups}
        back: Tensor = einops.rearrange(found, f"{arrow} -> {gated}", **groups)
        return back


def _mean(
    rows: Float[Tensor, "batch place group"], index: Int[Tensor, "batch place group"]
) -> Float[Tensor, "batch place group"]:
    sums = torch.zeros_like(rows).scatter_add(1, index, rows)
    counts = torch.zeros_like(rows).scatter_add(1, index, torch.ones_like(rows))
    return (sums / counts.clamp(min=1)).gather(1, index)


def _apart(numbers: Int[Tensor, "row place"], width: int, example: Int[Tensor, " row"]) -> bool:
    """Whether the numbers (below `width`) are few and none is in two examples, so that they can be used unchanged."""
    if width > numbers.numel():
        return False
    owner, numbers = example[:, None].expand_as(numbers).flatten(), numbers.flatten()
    return torch.equal(owner.new_zeros(width).scatter(0, numbers, owner).index_select(0, numbers), owner)


def undirected(
    source: Int[Tensor, " edge"], target: Int[Tensor, " edge"], *apart: Int[Tensor, " edge"]
) -> Int[Tensor, " edge"]:
    """Return a number per edge, the same for its reverse edge; repeated edges are paired in order.

    Args:
        apart: what else must be the same, such as the relation.
    """
    count = len(source)
    low, high = torch.minimum(source, target), torch.maximum(source, target)
    pair = _numbered(low, high - low, *apart)  # nodes of one graph have close numbers in a batch of many
    way = 2 * pair + (source > target)
    if int(torch.bincount(way, minlength=1).max()) < 2:  # usually no edge occurs twice
        return pair
    return pair * count + ExampleIndex(way, 2 * count).places()


def _numbered(*columns: Int[Tensor, " edge"]) -> Int[Tensor, " edge"]:
    """Return a number per edge, below the number of edges, the same where all columns are the same."""
    number, size = torch.zeros_like(columns[0]), 1
    for column in columns if len(columns[0]) else ():
        low, high = (int(end) for end in column.aminmax())
        if high == low:
            continue
        if size * (high - low + 1) > 2**62:
            _, number = torch.unique(number, return_inverse=True)
            size = len(number)
        size *= high - low + 1
        number = column - low if size == high - low + 1 else number * (high - low + 1) + (column - low)
    if size <= _TABLE * len(number):  # a table instead of a sort: each edge reads which edge wrote its entry
        places = torch.arange(len(number), device=number.device)
        return number.new_empty(size).scatter_(0, number, places).index_select(0, number)
    found: Tensor = torch.unique(number, return_inverse=True)[1]
    return found
