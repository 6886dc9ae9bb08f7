"""Example index: each row's example when the first axis is not the batch axis, as for edges of many graphs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class ExampleIndex:
    """Which example each row belongs to.

    Attributes:
        index: the example index of each row.
        count: number of examples in the batch; some may have no rows.
    """

    index: Int[Tensor, " row"]
    count: int

    def in_order(self, rows: Shaped[Tensor, "row *any"]) -> Shaped[Tensor, "row *any"]:
        """Return the rows sorted by example, in the same order in any batch that contains these examples."""
        return rows if self._order is None else rows[self._order.to(rows.device)]

    def back(self, rows: Shaped[Tensor, "row *any"]) -> Shaped[Tensor, "row *any"]:
        """Return rows sorted by `in_order` to their original order."""
        return rows if self._order is None else rows[self._order.argsort().to(rows.device)]

    @functools.cached_property
    def _order(self) -> Int[Tensor, " row"] | None:
        """None if the rows are already sorted."""
        return None if bool((self.index[1:] >= self.index[:-1]).all()) else self.index.argsort(stable=True)

    def sums(self, numbers: Float[Tensor, " row"]) -> Float[Tensor, " example"]:
        """Return the sum over each example's rows."""
        return numbers.new_zeros(self.count).index_add(0, self.index.to(numbers.device), numbers)

    def places(self) -> Int[Tensor, " row"]:
        """Return each row's index within its example."""
        sizes = torch.bincount(self.index, minlength=self.count)
        begins = sizes.cumsum(0) - sizes
        rows = self.in_order(self.index)
        return self.back(torch.arange(len(rows), device=rows.device) - begins.index_select(0, rows))
