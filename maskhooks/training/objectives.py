"""Objectives: a loss of gates and divergence, with multipliers that ascend while the parameters descend."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.masks.samples import GateSamples
from maskhooks.plugins.kind import declare
from maskhooks.settings.types import Decay, Fraction, NonNegative, Positive

_HIGHEST_LEVEL = 0.2  # a slope from few examples is noisy, and a multiplier that begins far too high opens many gates


class Objective(nn.Module):
    """min sparsity subject to divergence <= margin, for one group of maskings.

    `start` is called once with the divergence of the fully masked model, `forward` returns the loss of a step, and
    `ascend` moves the multiplier after it. Without amortisation each example has its own parameters and its own
    multiplier; losses are then summed over examples.

    Args:
        margin: m, in nats; None for an objective without one.

    Attributes:
        target: the divergence at which training is to end, by default the margin.
    """

    multiplier: Float[Tensor, ""] | Float[Tensor, " batch"]

    def __init__(self, margin: Positive | None) -> None:
        super().__init__()
        self.margin = self.target = math.inf
        if margin is None:
            return
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 < margin < math.inf:
            raise SettingError(f"the margin must be a positive divergence in nats, such as 0.1, got {margin!r}")
        self.margin = self.target = margin

    @abstractmethod
    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        """Set the initial multiplier.

        Args:
            closed: the divergence with every position masked: a scalar, or one number per example.
        """

    def level(self, slope: float) -> None:  # an objective may do nothing
        """Set the multiplier so that the loss neither falls nor rises when all gates open a little.

        A warm start calls it after `start`, since it begins at the target, where the multiplier should only hold it.

        Args:
            slope: by how much the mean penalty falls per fraction kept, in nats.
        """

    @abstractmethod
    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Return the loss to minimise.

        Args:
            divergence: what must stay within the margin.
            penalty: what the multiplier weights: the divergence itself, or more (`Penalty`).
        """

    @abstractmethod
    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        """Update the multiplier after a step, given that step's divergence over all devices."""

    def _level(self, per_example: Float[Tensor, " batch"]) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """Return the mean over the batch; or the values themselves, if each example has a multiplier."""
        return per_example if self.multiplier.dim() else per_example.mean()


class AugmentedLagrangian(Objective):
    """An augmented Lagrangian: the multiplier rises while the divergence exceeds its target, and falls below it.

    This is the method of multipliers (Hestenes 1969, Powell 1969; Rockafellar 1973 for inequalities). With
    e = (D - t) / K, where t is a little less than the margin and K the divergence of the fully masked model, the loss
    is (S + mu e) / (1 + mu) with mu = max(0, multiplier + damping e), and after the step
    multiplier <- max(0, multiplier + rate clip(D / t - 1, -1, 1)): it rises no faster than it can fall. S is the mean
    P(z != 0) over valid positions.

    Dividing by K makes the multiplier a pure number with a known collapse threshold: closing every gate costs mu and
    saves the sparsity S < 1, so it pays only if mu < S. Without damping, the multiplier sinks towards that threshold
    while gates are still open, because the constraint is slack, and then all gates close at once. A lower bound on the
    multiplier would hide this, and would be a fixed penalty. With damping, mu rises with the divergence in the same
    step, so closing everything never pays, whatever the multiplier; no lower bound is needed.

    Args:
        margin: m, in nats.
        target_fraction: t as a fraction of the margin. Training ends around t; at t = m, half of the states would
            exceed the margin.
        rate: speed of the multiplier.
        damping: how far mu rises above the multiplier with the divergence; 0 is the plain Lagrangian.
        initial: the initial multiplier.
    """

    scale: Float[Tensor, ""] | Float[Tensor, " batch"]

    def __init__(
        self,
        margin: Positive,
        *,
        target_fraction: Fraction = 0.85,
        rate: Positive = 0.004,
        damping: NonNegative = 5.0,
        initial: Positive = 0.5,
    ) -> None:
        super().__init__(margin)
        self.target = target_fraction * margin
        self.rate, self.damping, self.initial = rate, damping, initial
        self.register_buffer("multiplier", torch.tensor(initial))
        self.register_buffer("scale", torch.ones(()))

    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        self.scale = closed.detach().float().clamp(min=self.margin)
        self.multiplier = torch.full_like(self.scale, self.initial)

    def level(self, slope: float) -> None:
        self.multiplier = (self.scale / slope).clamp(max=1.0)

    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        error = (self._level(divergence.detach()) - self.target) / self.scale
        weight = (self.multiplier + self.damping * error).clamp(min=0)
        charged = (self._level(penalty) - self.target) / self.scale
        loss = (self._level(samples.expected_l0) + weight * charged) / (1 + weight)
        return loss.sum()

    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        error = self._level(divergence.detach()) / self.target - 1
        self.multiplier = (self.multiplier + self.rate * error.clamp(-1, 1)).clamp(min=0)


class RatioLagrangian(Objective):
    """A Lagrangian whose multiplier follows the ratio r = D / t, with a proportional and an integral term in log r.

    With the target t a little less than the margin, and r the running mean of D / t, the loss is
    (S + mu P / t) / (1 + mu) with mu = multiplier r^power, and after the step multiplier <- max(l0_price, multiplier
    r^rate). log r is clipped to [-2, 2] in the power and to [-1, 1] in the rate. P is the mean penalty, by default D.
    S is the mean P(z != 0) over valid positions. The two terms follow Stooke et al. 2020 (PID Lagrangian methods).

    The multiplier is a price: the fraction of positions worth a whole target of divergence. It starts low, because
    gates that open at once to avoid the cost of their noise do not close again. It moves in the logarithm, so it can
    rise and fall by orders of magnitude. The power keeps training near the target while the multiplier still moves: a
    multiplier that only ascends is late by hundreds of steps, opens everything, and is late again. Closing all gates
    does not pay, because mu is then multiplied by a large ratio. `l0_price` is for sites where only the last positions
    are left to drop, as in high layers: the margin is not spent on them.

    Args:
        margin: m, in nats.
        target_fraction: t as a fraction of the margin. Training ends around t; at t = m, half of the states would
            exceed the margin.
        rate: the integral term, an exponent per step.
        power: the proportional term, an exponent.
        initial: the initial multiplier, as a multiple of t / K, where K is the divergence of the fully masked model.
        l0_price: the lowest multiplier.
        ema_decay: decay of the running mean of the divergence.
    """

    smoothed: Float[Tensor, ""] | Float[Tensor, " batch"]

    def __init__(
        self,
        margin: Positive,
        *,
        target_fraction: Fraction = 0.85,
        rate: Positive = 0.005,
        power: NonNegative = 1.0,
        initial: Positive = 0.5,
        l0_price: NonNegative = 0.0,
        ema_decay: Decay = 0.9,
    ) -> None:
        super().__init__(margin)
        self.target = target_fraction * margin
        self.rate, self.power, self.ema_decay = rate, power, ema_decay
        self.l0_price, self.initial = l0_price, initial
        self.register_buffer("multiplier", torch.tensor(initial))
        self.register_buffer("smoothed", torch.tensor(self.target))

    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        worst = closed.detach().float().clamp(min=self.target)
        self.multiplier = (self.initial * self.target / worst).clamp(min=self.l0_price)
        self.smoothed = torch.full_like(self.multiplier, self.target)

    def level(self, slope: float) -> None:
        most = max(self.l0_price, _HIGHEST_LEVEL)
        self.multiplier = torch.full_like(self.multiplier, self.target / slope).clamp(self.l0_price, most)

    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        weight = self.multiplier * (self.power * self._excess()).exp()
        loss = (self._level(samples.expected_l0) + weight * self._level(penalty) / self.target) / (1 + weight)
        return loss.sum()

    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        self.smoothed = self.ema_decay * self.smoothed + (1 - self.ema_decay) * self._level(divergence.detach())
        ascended = self.multiplier * (self.rate * self._excess().clamp(-1, 1)).exp()
        self.multiplier = ascended.clamp(min=self.l0_price)

    def _excess(self) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """log r, clipped to [-2, 2]."""
        return (self.smoothed / self.target).clamp(min=1e-9).log().clamp(-2, 2)


class PaperLagrangian(Objective):
    """The objective of DiffMask's authors: multiplier (D - m) + mean log P(z != 0).

    De Cao et al. 2020, eq. 4 and code. The multiplier starts at 1, ascends by RMSprop, and is clipped to [0, 200].

    Args:
        margin: m, in nats.
        rate: learning rate of the multiplier.
    """

    square: Float[Tensor, ""] | Float[Tensor, " batch"]

    def __init__(self, margin: Positive, *, rate: Positive = 0.3) -> None:
        super().__init__(margin)
        self.rate = rate
        self.register_buffer("multiplier", torch.ones(()))
        self.register_buffer("square", torch.zeros(()))

    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        self.multiplier = torch.ones_like(closed)
        self.square = torch.zeros_like(closed)

    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        sparsity = self._level(samples.per_example(samples.log_open))
        loss = self.multiplier * (self._level(penalty) - self.margin) + sparsity
        return loss.sum()

    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        slope = self._level(divergence.detach()) - self.margin
        self.square = 0.99 * self.square + 0.01 * slope**2
        self.multiplier = (self.multiplier + self.rate * slope / (self.square.sqrt() + 1e-8)).clamp(0, 200)


OBJECTIVES = declare("objective", Objective)
