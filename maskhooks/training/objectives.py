"""Objectives: a loss over gates and a divergence, with multipliers that ascend while the parameters descend."""

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


class Objective(nn.Module):
    """min sparsity subject to divergence <= margin, for one group of maskings.

    `start` is called once with the divergence of the fully masked model, `forward` gives the loss of a step, and
    `ascend` moves the multiplier after it. Where every example has parameters of its own (no amortisation), so it has a
    multiplier: both then work per example, and losses add up.

    Args:
        margin: m, in nats.
    """

    multiplier: Float[Tensor, ""] | Float[Tensor, " batch"]

    def __init__(self, margin: Positive) -> None:
        super().__init__()
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 < margin < math.inf:
            raise SettingError(f"the margin is a divergence in nats and positive, got {margin!r}; 0.1 is usual")
        self.margin = margin

    @abstractmethod
    def start(self, closed: Float[Tensor, ""] | Float[Tensor, " batch"]) -> None:
        """Sets the multiplier to its start.

        Args:
            closed: the divergence with every position masked, a scalar, or one number an example.
        """

    @abstractmethod
    def forward(
        self, samples: GateSamples, divergence: Float[Tensor, " batch"], penalty: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """The loss to descend on.

        Args:
            divergence: what is held within the margin.
            penalty: what the multiplier is the price of: the divergence itself, or more (`Penalty`).
        """

    @abstractmethod
    def ascend(self, divergence: Float[Tensor, " batch"]) -> None:
        """Moves the multiplier after a step, given that step's divergence (over all devices)."""

    def _level(self, per_example: Float[Tensor, " batch"]) -> Float[Tensor, ""] | Float[Tensor, " batch"]:
        """Means over the batch, or the examples themselves where each has a multiplier."""
        return per_example if self.multiplier.dim() else per_example.mean()


class AugmentedLagrangian(Objective):
    """Method of multipliers for the constraint (Hestenes 1969, Powell 1969; Rockafellar 1973 for inequalities).

    With e = (D - t) / K, where t is a little less than the margin and K the divergence of the fully masked model, the
    loss is (S + mu e) / (1 + mu) with mu = max(0, multiplier + damping e), and after the step
    multiplier <- max(0, multiplier + rate clip(D / t - 1, -1, 1)): it rises no faster than it can fall. S is the mean
    P(z != 0) over real positions.

    Dividing by K makes the multiplier a pure number whose collapse threshold is known: closing every gate costs mu and
    saves the sparsity S < 1, so it can pay only where mu < S. A multiplier without damping sinks towards that
    threshold while gates are still open, because the constraint is slack then, and all gates close at once; a floor
    under it hides this, and is a fixed penalty. With damping mu rises with the divergence in the same step, so that
    closing everything never pays, whatever the multiplier; no floor is needed.

    Args:
        margin: m, in nats.
        aim: t as a fraction of the margin. Training ends around t; at t = m, half of the states would be too far.
        rate: speed of the multiplier.
        damping: how far mu rises above the multiplier with the divergence; 0 is the plain Lagrangian.
        initial: the multiplier's start.
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
    """A Lagrangian whose multiplier answers to the ratio r = D / t, at once and in the long run.

    With the target t a little less than the margin, and r the running mean of D / t, the loss is
    (S + mu P / t) / (1 + mu) with mu = multiplier r^power, and after the step multiplier <- max(floor, multiplier
    r^rate), where log r counts up to 2 either way in the power, and up to 1 in the rate. P is the mean penalty, D
    itself by default. S is the mean P(z != 0) over real positions. These are a proportional and an integral term in the
    logarithm, after Stooke et al. 2020 (PID Lagrangian methods).

    The multiplier is a price: the fraction of positions for which a whole target of divergence is spent. It starts low,
    since gates that open at once because their noise is dear do not come back, and can rise and fall by orders of
    magnitude, since it moves in the logarithm. The power keeps training near the target while the multiplier is still
    on its way: one that only ascends is late by hundreds of steps, opens everything, and is late again. Closing all
    gates does not pay, because mu is then multiplied by a large ratio. The floor is for sites where the last positions
    are all that is left to drop, as in high layers: the margin is not used up for them.

    Args:
        margin: m, in nats.
        aim: t as a fraction of the margin. Training ends around t; at t = m, half of the states would be too far.
        rate: the integral term, an exponent a step.
        power: the proportional term, an exponent.
        initial: the multiplier's start, in terms of t / K, where K is the divergence of the fully masked model.
        floor: its least.
        memory: of the running mean of the divergence.
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
        """log r, within two e-folds."""
        return (self.smoothed / self.target).clamp(min=1e-9).log().clamp(-2, 2)


class PaperLagrangian(Objective):
    """The authors' objective (De Cao et al. 2020, eq. 4 and code): multiplier (D - m) + mean log P(z != 0).

    The multiplier starts at 1, ascends by RMSprop at the given rate, and is clipped to [0, 200].
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
