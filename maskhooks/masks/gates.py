"""Gates: turn logits into samples in [0, 1], their probability of being non-zero, and their log-probability."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from maskhooks.errors import SettingError
from maskhooks.plugins.kind import declare
from maskhooks.settings.schema import check_fields

_FAR = 100.0  # beyond the logits of any gate
_EDGE = 1e-6  # samples this close to 1 count as 1: float32 has little in between


class Gate(ABC):
    """A distribution of gate values, given logits. It computes in float32 whatever the logits' dtype."""

    @abstractmethod
    def sample(self, logits: Float[Tensor, "*any"], generator: Generator | None = None) -> Float[Tensor, "*any"]:
        """Draw one sample in [0, 1] per logit, differentiable in the logits."""

    @abstractmethod
    def log_open(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return log P(z != 0), in nats."""

    @abstractmethod
    def log_prob(self, sample: Float[Tensor, "*any"], logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the log-probability of a sample, in nats: a mass at 0 and 1, a density between them."""

    def probability(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return P(z != 0), the expected fraction kept; its mean over positions is the expected L0."""
        return self.log_open(logits).exp()

    @functools.cached_property
    def middle(self) -> float:
        """The logit at which P(z != 0) is one half, found by bisection."""
        low, high = -_FAR, _FAR
        for _ in range(40):
            half = (low + high) / 2
            low, high = (low, half) if self.probability(torch.tensor(half)) > 0.5 else (half, high)
        return (low + high) / 2

    def tempered(self, factor: float) -> Gate:
        """Return the gate at `factor` times its temperature, or itself if it has none."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the arguments that rebuild the gate."""
        return asdict(self)  # type: ignore[call-overload, no-any-return] # our gates are dataclasses


@dataclass(frozen=True)
class HardConcrete(Gate):
    """A stretched and clipped binary concrete variable (Louizos et al. 2018, eq. 10 to 12).

    With u ~ U(0, 1): s = sigmoid((log u - log(1 - u) + a) / temperature), z = clip(s (high - low) + low, 0,
    1), and P(z != 0) = sigmoid(a - temperature log(-low / high)). The defaults are DiffMask's, (-0.2, 1.0) at
    temperature 0.2. On paper only 0 then has a probability mass, but in float32 most samples at a high logit are
    exactly 1. `log_prob` therefore counts all samples within 1e-6 of 1 as one mass, for any `high`.

    With `rounded`, z is 1 if it would be above 0.5 and 0 otherwise, with the gradient of the unrounded z
    (Schlichtkrull et al. 2021). An open gate then adds no noise, and P(z != 0) is P(z = 1).

    Args:
        temperature: how soft samples are; at a lower temperature they are closer to 0 and 1.
        low, high: the interval that the variable is stretched to before it is clipped to [0, 1].
        rounded: whether samples are rounded to 0 or 1, with the gradient of the unrounded sample.

    Raises:
        SettingError: `temperature` is not positive, or not low < 0 < 1 <= high.
    """

    temperature: float = 0.2
    low: float = -0.2
    high: float = 1.0
    rounded: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.temperature > 0 and self.low < 0 and self.high >= 1):
            raise SettingError(
                f"hard concrete needs temperature > 0 and low < 0 < 1 <= high, got "
                f"temperature={self.temperature}, "
                f"low={self.low}, high={self.high}"
            )

    @classmethod
    def louizos(cls) -> HardConcrete:
        """The hard concrete gate of Louizos et al. 2018: temperature 2/3, stretched to (-0.1, 1.1)."""
        return cls(2 / 3, -0.1, 1.1)

    @classmethod
    def straight_through(cls) -> HardConcrete:
        """A hard concrete gate whose samples are rounded to 0 or 1, at temperature 1/3 (Schlichtkrull et al. 2021)."""
        return cls(1 / 3, rounded=True)

    def tempered(self, factor: float) -> HardConcrete:
        return replace(self, temperature=factor * self.temperature)

    def sample(self, logits: Float[Tensor, "*any"], generator: Generator | None = None) -> Float[Tensor, "*any"]:
        tiny = torch.finfo(torch.float32).tiny
        u = torch.rand(logits.shape, generator=generator, device=_device(logits, generator), dtype=torch.float32).to(
            logits.device
        )
        u = u.clamp(tiny, 1 - 2**-24)
        s = torch.sigmoid((u.log() - (-u).log1p() + logits.float()) / self.temperature)
        z = (s * (self.high - self.low) + self.low).clamp(0, 1)
        return (z > 0.5).float() + (z - z.detach()) if self.rounded else z

    def log_open(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return F.logsigmoid(logits.float() - self._threshold)

    def log_prob(self, sample: Float[Tensor, "*any"], logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        if self.rounded:
            return F.logsigmoid(torch.where(sample == 0, -1, 1) * (logits.float() - self._threshold))
        logits, width = logits.float(), self.high - self.low
        inside = sample.float().clamp(_EDGE, 1 - _EDGE)
        log_s, log_rest = ((inside - self.low) / width).log(), ((self.high - inside) / width).log()
        x = self.temperature * (log_s - log_rest) - logits  # the logistic noise that gives this sample
        density = math.log(self.temperature / width) - log_s - log_rest + F.logsigmoid(x) + F.logsigmoid(-x)
        closed = F.logsigmoid(self.temperature * math.log(-self.low / self.high) - logits)
        top = math.log((1 - _EDGE - self.low) / (self.high - 1 + _EDGE))
        opened = F.logsigmoid(logits - self.temperature * top)
        return torch.where(sample == 0, closed, torch.where(sample >= 1 - _EDGE, opened, density))

    @property
    def _threshold(self) -> float:
        """The logit at which P(z != 0) is one half."""
        least = 0.5 if self.rounded else 0.0  # z counts as open above this
        return self.temperature * math.log((least - self.low) / (self.high - least))


@dataclass(frozen=True)
class Bernoulli(Gate):
    """z = 1 with probability sigmoid(a), else 0.

    The gradient is straight-through (Bengio et al. 2013), dz/da = p (1 - p) with p = sigmoid(a). For an unbiased
    gradient, use `log_prob` in a score-function estimator.
    """

    def sample(self, logits: Float[Tensor, "*any"], generator: Generator | None = None) -> Float[Tensor, "*any"]:
        p = torch.sigmoid(logits.float())
        u = torch.rand(logits.shape, generator=generator, device=_device(logits, generator), dtype=torch.float32).to(
            logits.device
        )
        return (u < p).float() + (p - p.detach())

    def log_open(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return F.logsigmoid(logits.float())

    def log_prob(self, sample: Float[Tensor, "*any"], logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return F.logsigmoid(torch.where(sample == 0, -logits.float(), logits.float()))


def _device(logits: Float[Tensor, "..."], generator: Generator | None) -> torch.device:
    return generator.device if generator is not None else logits.device


GATES = declare("gate", Gate)
#: How an explainer takes a gate: its name, a mapping of its name and settings, or a `Gate`.
GateSetting = Annotated[str | Mapping[str, Any] | Gate, GATES]
