"""Probes: where a gate's logits come from, a small network on the values it reads or free numbers per example."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from maskhooks.errors import SettingError
from maskhooks.masks.running_stats import update_moments

_PORTION = 2048  # rows at once without gradients: larger intermediate values take longer to allocate than to compute


class Picked(NamedTuple):
    """Rows of states by their numbers, such as the states of nodes at the ends of edges."""

    states: Float[Tensor, "state _"]
    numbers: Int[Tensor, " position"]

    @property
    def rows(self) -> Float[Tensor, "position _"]:
        """The rows themselves: each number's state."""
        return self.states.index_select(0, self.numbers)


class Probe(nn.Module):
    """Gives logits per position and group, from the values at the sites it reads.

    `start` is called once with the number of features of each site read; `fit` sees values before training; `forward`
    takes them in float32.

    Attributes:
        picks: whether `forward` takes `Picked` values too, and so can compute once for each state what is many rows.
    """

    started = False
    picks = False

    @abstractmethod
    def start(self, features: Sequence[int], groups: int) -> None:
        """Allocates weights for values with these numbers of features, and this many logits a position."""

    @abstractmethod
    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Gathers statistics from values at real positions; may be called repeatedly."""

    @abstractmethod
    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        """One logit for each position and group."""


class MLP(Probe):
    """One hidden layer on standardised values: logit = clamp(scale (W2 tanh(W1 x + c) + c2) + b, low, high).

    x is (value - mean) / deviation over real training positions. Where several sites are read, a value with more
    features is scaled down by their number: Adam moves all weights alike, so a wide value would outrun a narrow one.
    The clamp is projected: its gradient is dropped only where it would push a logit further out, so that a gate at
    either end can come back.

    Args:
        hidden: units of the hidden layer; by default a quarter of the features, at least 32.
        start_logit: b at the start; 2 keeps a position with probability .91.
        low, high: the logits' range. Above 5 a gate is open beyond what a gradient can undo; far below it the noise of
            the open gate alone costs divergence.
        scale: speed of the logits in terms of the output layer's.
    """

    mean: Float[Tensor, " features"]
    variance: Float[Tensor, " features"]
    count: Float[Tensor, ""]
    weight: Float[Tensor, " features"]

    def __init__(
        self,
        *,
        hidden: int | None = None,
        start_logit: float = 2.0,
        low: float = -7.0,
        high: float = 5.0,
        scale: float = 3.0,
    ) -> None:
        super().__init__()
        if not low < start_logit < high:
            raise SettingError(f"a probe's logits start between low and high, got {low} < {start_logit} < {high}")
        self.hidden, self.low, self.high, self.scale = hidden, low, high, scale
        self.start_logit = start_logit

    def start(self, features: Sequence[int], groups: int) -> None:
        size = sum(features)
        width = self.hidden or max(32, size // 4)
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, groups)
        self.bias = nn.Parameter(torch.full((groups,), self.start_logit))
        least = min(features)
        scale = math.sqrt(size / (len(features) * least))
        equal = [scale * least / count for count in features for _ in range(count)]
        self.register_buffer("weight", torch.tensor(equal))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        if len(values[0]):
            update_moments(self.mean, self.variance, self.count, torch.cat([value.float() for value in values], -1))

    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        x = torch.cat([value.float() for value in values], -1) if len(values) > 1 else values[0].float()
        scaled = self.first.weight * (self.weight / self.variance.sqrt().clamp(min=1e-6))
        hidden = torch.tanh(F.linear(x, scaled, self.first.bias - scaled @ self.mean))  # x standardised on the way
        return _clamp(self.scale * self.last(hidden) + self.bias, self.low, self.high)


class SummedMLP(Probe):
    """A sum of one projection for each value read, each normalised by itself: GraphMask's probe.

    logit = clamp(W relu((LN_1(W_1 x_1) + ... + LN_n(W_n x_n) + c) / n) + b, low, high), so that no value outweighs
    another, whatever its scale and number of features (Schlichtkrull et al. 2021, section 3, and code). The clamp is
    that of `MLP`; the authors have none. Of rows that are picked from fewer states, states are projected, not rows.

    Args:
        hidden: units of the hidden layer; by default as many as the last value read has features, at least 32.
        start_logit: b at the start; the authors have 3.
        low, high: the logits' range.
    """

    picks = True

    def __init__(
        self, *, hidden: int | None = None, start_logit: float = 2.0, low: float = -7.0, high: float = 7.0
    ) -> None:
        super().__init__()
        self.hidden, self.start_logit, self.low, self.high = hidden, start_logit, low, high

    def start(self, features: Sequence[int], groups: int) -> None:
        width = self.hidden or max(32, features[-1])
        self.first = nn.ModuleList([nn.Linear(size, width, bias=False) for size in features])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in features])
        self.shift = nn.Parameter(torch.zeros(width))
        self.last = nn.Linear(width, groups, bias=False)
        self.bias = nn.Parameter(torch.full((groups,), self.start_logit))

    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Gathers nothing."""

    def forward(self, values: Sequence[Float[Tensor, "*positions _"] | Picked]) -> Float[Tensor, "*positions groups"]:
        terms = [self._picked(number, v) if isinstance(v, Picked) else v for number, v in enumerate(values)]
        if torch.is_grad_enabled():
            return self._logits(terms)
        parts = [self._logits(part) for part in zip(*map(_portions, terms), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _picked(self, number: int, value: Picked) -> Float[Tensor, "position _"] | Picked:
        """A value's term where that is less to compute for states than for rows, else its rows."""
        states, numbers = value
        return value.rows if len(states) > len(numbers) else Picked(self._term(number, states), numbers)

    def _term(self, number: int, value: Float[Tensor, "*rows _"]) -> Float[Tensor, "*rows hidden"]:
        term: Tensor = self.norms[number](self.first[number](value.float()))
        return term

    def _logits(self, values: Sequence[Float[Tensor, "*positions _"] | Picked]) -> Float[Tensor, "*positions groups"]:
        """The logits.

        Args:
            values: as they are read, or their terms, to be picked.
        """
        hidden: Tensor = self.shift
        for number, value in enumerate(values):
            hidden = hidden + (value.rows if isinstance(value, Picked) else self._term(number, value))
        return _clamp(self.last(torch.relu(hidden)) / len(values) + self.bias, self.low, self.high)


class PaperMLP(Probe):
    """The authors' probe: weight-normed Linear, tanh, weight-normed Linear, tanh, times 10, plus a learned bias of 5.

    The hidden layer has a quarter of a state's features, at least 32. Values are not standardised. The head saturates
    open: at a logit near 15 hardly any gradient comes back.
    """

    def __init__(self, *, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = hidden

    def start(self, features: Sequence[int], groups: int) -> None:
        size = sum(features)
        hidden = self.hidden or max(32, features[-1] // 4)
        self.network = nn.Sequential(
            weight_norm(nn.Linear(size, hidden)),
            nn.Tanh(),
            weight_norm(nn.Linear(hidden, groups, bias=False)),
        )
        self.bias = nn.Parameter(torch.tensor(5.0))

    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Gathers nothing."""

    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        x = torch.cat([value.float() for value in values], -1)
        logits: Tensor = 10 * torch.tanh(self.network(x)) + self.bias
        return logits


class FreeLogits(Probe):
    """Free numbers, one per example, position and group: no amortisation. They live for one batch.

    Args:
        start_logit: where they start.
        spread: their standard deviation there.
        low, high: their range.
    """

    logits: nn.Parameter

    def __init__(self, *, start_logit: float = 2.0, spread: float = 0.0, low: float = -7.0, high: float = 5.0) -> None:
        super().__init__()
        self.start_logit, self.spread, self.low, self.high = start_logit, spread, low, high

    def start(self, features: Sequence[int], groups: int) -> None:
        self.groups = groups

    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Gathers nothing."""

    def begin(self, positions: Sequence[int], device: torch.device, generator: Generator | None = None) -> None:
        """Fresh numbers for a batch with these position axes.

        Args:
            generator: of where they start, where that is spread.
        """
        drawn = torch.randn(*positions, self.groups, generator=generator) if self.spread else torch.zeros(1)
        logits = (self.start_logit + self.spread * drawn).clamp(self.low, self.high)
        self.logits = nn.Parameter(logits.expand(*positions, self.groups).clone().to(device))

    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        return _clamp(self.logits, self.low, self.high)


def _portions(value: Float[Tensor, "position *any"] | Picked) -> Sequence[Tensor | Picked]:
    if isinstance(value, Picked):
        return [Picked(value.states, part) for part in value.numbers.split(_PORTION)]
    parts: Sequence[Tensor] = value.split(_PORTION)
    return parts


def _clamp(logits: Float[Tensor, "*any"], low: float, high: float) -> Float[Tensor, "*any"]:
    if not torch.is_grad_enabled():
        return logits.clamp(low, high)
    clamped: Tensor = _ProjectedClamp.apply(logits, low, high)  # type: ignore[no-untyped-call] # torch's own
    return clamped


class _ProjectedClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.range = low, high
        return logits.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        low, high = ctx.range
        outward = ((logits >= high) & (grad < 0)) | ((logits <= low) & (grad > 0))
        return torch.where(outward, 0, grad), None, None
