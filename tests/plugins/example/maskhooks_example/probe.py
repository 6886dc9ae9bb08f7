"""A probe without a hidden layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.masks.probes import Probe


class Linear(Probe):
    """logit = c + r tanh(W x + b), where c and r are the middle and half the width of the logits' range.

    Args:
        init_logit: the logit of every position at the start, where W is 0.
        min_logit, max_logit: the logits' range.
    """

    def __init__(self, *, init_logit: float = 2.0, min_logit: float = -7.0, max_logit: float = 5.0) -> None:
        super().__init__()
        if not min_logit < init_logit < max_logit:
            raise SettingError(f"init_logit is between {min_logit} and {max_logit}, got {init_logit}")
        self.middle, self.half = (max_logit + min_logit) / 2, (max_logit - min_logit) / 2
        self.init_logit = init_logit

    def start(self, features: Sequence[int], groups: int) -> None:
        self.linear = nn.Linear(sum(features), groups)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, math.atanh((self.init_logit - self.middle) / self.half))

    def fit(self, values: Sequence[Tensor]) -> None:
        """Does nothing: no statistics are needed."""

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        x = torch.cat([value.float() for value in values], -1)
        return self.middle + self.half * torch.tanh(self.linear(x))
