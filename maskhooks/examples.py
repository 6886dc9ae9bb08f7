"""Examples: which example of a batch each row belongs to, where rows are no batch, as with edges of many graphs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Whose each row is.

    Attributes:
        index: the number of each row's example.
        count: examples in the batch; some may have no row.
    """

    index: Int[Tensor, " row"]
    count: int

    def sums(self, numbers: Float[Tensor, " row"]) -> Float[Tensor, " example"]:
        """The sum over each example's rows."""
        return numbers.new_zeros(self.count).index_add(0, self.index.to(numbers.device), numbers)

    def places(self) -> Int[Tensor, " row"]:
        """The place of each row among those of its example."""
        sizes = torch.bincount(self.index, minlength=self.count)
        begins = sizes.cumsum(0) - sizes
        order = self.index.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device) - begins[self.index[order]]
        return places
