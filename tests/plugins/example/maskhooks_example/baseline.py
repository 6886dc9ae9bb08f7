"""A baseline half way between the extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from maskhooks.masks.baselines import Baseline


class Midrange(Baseline):
    """Half way between the lowest and the highest value of each feature at valid positions; 0 before there are any."""

    lowest: Tensor
    highest: Tensor

    def start(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("lowest", torch.full(shape, torch.inf))  # buffers are saved with the explainer
        self.register_buffer("highest", torch.full(shape, -torch.inf))

    def fit(self, values: Tensor) -> None:
        if len(values):
            self.lowest = torch.minimum(self.lowest, values.float().amin(0))
            self.highest = torch.maximum(self.highest, values.float().amax(0))

    def forward(self) -> Tensor:
        return torch.where(self.lowest <= self.highest, (self.lowest + self.highest) / 2, 0.0)
