"""Optimizers of probes and baselines, and Lookahead, which torch.optim lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from maskhooks.plugins.kind import declare
from maskhooks.settings.types import Count, Decay, Fraction


class Lookahead(torch.optim.Optimizer):
    """Every k steps of an inner optimizer, moves the weights back towards slow copies (Zhang et al. 2019, algorithm 1).

    Args:
        inner: the fast optimizer.
        k: steps between two synchronisations.
        alpha: the slow weights' step towards the fast ones, as a fraction of the distance.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, k: int = 6, alpha: float = 0.5) -> None:
        self.inner, self.k, self.alpha = inner, k, alpha
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self._steps = 0
        self._slow = [[weight.detach().clone() for weight in group["params"]] for group in self.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = self.inner.step(closure)
        self._steps += 1
        if self._steps % self.k == 0:
            self._synchronise()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "steps": self._steps, "slow": self._slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.param_groups = self.inner.param_groups
        self._steps = state_dict["steps"]
        for slow, saved in zip(self._slow, state_dict["slow"], strict=True):
            for held, weight in zip(slow, saved, strict=True):
                held.copy_(weight)

    @torch.no_grad()
    def _synchronise(self) -> None:
        for group, slow in zip(self.param_groups, self._slow, strict=True):
            for weight, held in zip(group["params"], slow, strict=True):
                weight.copy_(held.lerp_(weight, self.alpha))


def adam(params: Iterable[Any], *, beta1: Decay = 0.9, beta2: Decay = 0.99) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015).

    Args:
        params: groups of parameters with their learning rates.
        beta1: decay rate of the gradient's mean.
        beta2: decay rate of the squared gradient's mean.
    """
    return torch.optim.Adam(params, betas=(beta1, beta2))


def lookahead(params: Iterable[Any], *, k: Count = 6, alpha: Fraction = 0.5) -> torch.optim.Optimizer:
    """Lookahead over centred RMSprop, the optimizer of DiffMask's authors.

    Args:
        params: groups of parameters with their learning rates.
        k: steps between two synchronisations.
        alpha: the slow weights' step towards the fast ones, as a fraction of the distance.
    """
    return Lookahead(torch.optim.RMSprop(params, alpha=0.99, eps=1e-8, centered=True), k=k, alpha=alpha)


def rmsprop(params: Iterable[Any], *, decay: Decay = 0.99, centered: bool = True) -> torch.optim.Optimizer:
    """RMSprop (Hinton 2012), centred by default.

    Args:
        params: groups of parameters with their learning rates.
        decay: decay rate of the squared gradient's mean.
        centered: whether the gradient is divided by its standard deviation, instead of its root mean square.
    """
    return torch.optim.RMSprop(params, alpha=decay, eps=1e-8, centered=centered)


OPTIMIZERS = declare("optimizer", torch.optim.Optimizer)
