"""Example index: the example of each row, where the first axis is not the batch, as with edges of many graphs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class ExampleIndex:
    """The example that each row belongs to.

    Attributes:
        index: the number of each row's example.
        count: examples in the batch; some may have no row.
    """

    index: Int[Tensor, " row"]
    count: int

    def in_order(self, rows: Shaped[Tensor, "row *any"]) -> Shaped[Tensor, "row *any"]:
        """Rows example by example, as they are in any batch that these examples are part of."""
        return rows if self._order is None else rows[self._order.to(rows.device)]

    def back(self, rows: Shaped[Tensor, "row *any"]) -> Shaped[Tensor, "row *any"]:
        """Rows that `in_order` gave, where they were."""
        return rows if self._order is None else rows[self._order.argsort().to(rows.device)]

    @functools.cached_property
    def _order(self) -> Int[Tensor, " row"] | None:
        """None where rows stand so already."""
        return None if bool((self.index[1:] >= self.index[:-1]).all()) else self.index.argsort(stable=True)

    def sums(self, numbers: Float[Tensor, " row"]) -> Float[Tensor, " example"]:
        """The sum over each example's rows."""
        return numbers.new_zeros(self.count).index_add(0, self.index.to(numbers.device), numbers)

    def places(self) -> Int[Tensor, " row"]:
        """The place of each row among those of its example."""
        sizes = torch.bincount(self.index, minlength=self.count)
        begins = sizes.cumsum(0) - sizes
        rows = self.in_order(self.index)
        return self.back(torch.arange(len(rows), device=rows.device) - begins.index_select(0, rows))
