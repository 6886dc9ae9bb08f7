"""An optimizer that looks at signs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from maskhooks.settings.types import Decay


class SignSGD(torch.optim.Optimizer):
    """Steps of one size against the sign of the gradient's running mean (Bernstein et al. 2018, signum).

    Args:
        params: groups of parameters with their learning rates.
        momentum: decay rate of the mean; 0 takes each gradient as it is.
    """

    def __init__(self, params: Iterable[Any], *, momentum: Decay = 0.9) -> None:
        super().__init__(params, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                    mean.lerp_(weight.grad, 1 - group["momentum"])
                    weight.sub_(mean.sign(), alpha=group["lr"])
        return loss
