"""The library that the plugin serves: a model of its own kind."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Pyramid(nn.Module):
    """Linear storeys, each half as wide as the one below."""

    def __init__(self, width: int = 8, storeys: int = 3) -> None:
        super().__init__()
        widths = [width >> storey for storey in range(storeys + 1)]
        self.storeys = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for storey in self.storeys:
            x = storey(x).tanh()
        return x
