"""Probes: compute gate logits, with a small network on the values read or as per-example logits (unamortised)."""

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
from maskhooks.plugins.kind import declare
from maskhooks.settings.types import Count, NonNegative

_PORTION = 2048  # rows at once without gradients: larger intermediates take longer to allocate than to compute


class Picked(NamedTuple):
    """Rows of states by index, such as the states of nodes at the ends of edges."""

    states: Float[Tensor, "state _"]
    indices: Int[Tensor, " position"]

    @property
    def rows(self) -> Float[Tensor, "position _"]:
        """The rows themselves: each number's state."""
        return self.states.index_select(0, self.indices)


class Probe(nn.Module):
    """A module that computes logits per position and group from the values at the sites it reads.

    `start` is called once with the number of features of each site read. `fit` sees values before training.
    `forward` computes in float32.

    Attributes:
        picks: whether `forward` also takes `Picked` values, and so computes once per state what many rows share.
    """

    started = False
    picks = False

    def __init__(self) -> None:  # a module takes arguments of any name; a probe has the settings that it names
        super().__init__()

    def join(self, vote: int, votes: int) -> None:  # most probes do nothing
        """Prepares for being one of several votes whose product masks a site. Called once, before `start`.

        Args:
            vote: the index of this probe's vote.
            votes: how many votes there are.
        """

    @abstractmethod
    def start(self, features: Sequence[int], groups: int) -> None:
        """Allocate weights for sites with these numbers of features, and `groups` logits per position."""

    @abstractmethod
    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Gather statistics from values at valid positions. May be called more than once."""

    def shift_logits(self, by: float) -> None:  # most probes do nothing
        """Adds a number to all logits, before any clamp. A warm start calls it to begin at the target divergence."""

    def sharpen(self, factor: float, middle: float) -> None:  # most probes do nothing
        """Multiplies the distance of all logits from `middle`, after any clamp. Training does so after its last step.

        Args:
            middle: the logit at which a gate is open with a probability of one half.
        """

    @abstractmethod
    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        """One logit for each position and group."""


class Clamped(Probe):
    """A probe with a bias whose logits are clamped: factor clamp(x + bias, min_logit, max_logit) + offset.

    Args:
        init_logit: bias at the start.
        min_logit, max_logit: the range of the logits.
    """

    factor: Float[Tensor, ""]
    offset: Float[Tensor, ""]

    def __init__(self, init_logit: float, min_logit: float, max_logit: float) -> None:
        super().__init__()
        self.init_logit, self.min_logit, self.max_logit = init_logit, min_logit, max_logit

    def start(self, features: Sequence[int], groups: int) -> None:
        self.bias = nn.Parameter(torch.full((groups,), self.init_logit))
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def shift_logits(self, by: float) -> None:
        self.bias.data.add_(by)

    def sharpen(self, factor: float, middle: float) -> None:
        self.factor.mul_(factor)
        self.offset.mul_(factor).add_(middle * (1 - factor))

    def clamped(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the logits from those without bias, clamp and sharpening."""
        return self.factor * _clamp(logits + self.bias, self.min_logit, self.max_logit) + self.offset


class MLP(Clamped):
    """One hidden layer on standardised values x: clamp(scale (W2 tanh(W1 x + c) + c2) + b, min_logit, max_logit).

    x is (value - mean) / deviation over valid training positions. If several sites are read, each value is scaled
    down in proportion to its number of features: Adam moves all weights alike, so a wide value would outrun a narrow
    one. The clamp is projected: its gradient is dropped only where it would push a logit further out of range, so a
    gate at either end can come back.

    Args:
        hidden: units of the hidden layer; by default a quarter of the features, at least 32.
        init_logit: b at the start; 2 keeps a position with probability .91.
        min_logit, max_logit: the range of the logits. Above 5 a gate is too open for a gradient to close
            it; with a maximum far below 5, the noise of the open gate alone costs divergence.
        scale: how fast the logits move relative to the output layer.
    """

    mean: Float[Tensor, " features"]
    variance: Float[Tensor, " features"]
    count: Float[Tensor, ""]
    weight: Float[Tensor, " features"]

    def __init__(
        self,
        *,
        hidden: Count | None = None,
        init_logit: float = 2.0,
        min_logit: float = -7.0,
        max_logit: float = 5.0,
        scale: float = 3.0,
    ) -> None:
        super().__init__(init_logit, min_logit, max_logit)
        if not min_logit < init_logit < max_logit:
            raise SettingError(
                f"init_logit must be between min_logit and max_logit, got {min_logit} < {init_logit} < {max_logit}"
            )
        self.hidden, self.scale = hidden, scale

    def join(self, vote: int, votes: int) -> None:
        """Starts later votes nearly open, so that every depth first keeps as much; raises `max_logit` by log(votes).

        Together the votes can then be as open as one alone.
        """
        self.init_logit += 2.0 if vote else 0.0
        self.max_logit += math.log(votes)

    def start(self, features: Sequence[int], groups: int) -> None:
        super().start(features, groups)
        size = sum(features)
        width = self.hidden or max(32, size // 4)
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, groups)
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
        hidden = torch.tanh(F.linear(x, scaled, self.first.bias - scaled @ self.mean))  # standardises x
        return self.clamped(self.scale * self.last(hidden))


class SummedMLP(Clamped):
    """GraphMask's probe: a sum of one projection per value read, each normalised separately.

    logit = clamp(W relu((LN_1(W_1 x_1) + ... + LN_n(W_n x_n) + c) / n) + b, low, high), so no value outweighs
    another, whatever its scale and number of features (Schlichtkrull et al. 2021, section 3, and code). The clamp is
    that of `MLP`; the authors have none. Where rows are picked from fewer states, the states are projected.

    Args:
        hidden: units of the hidden layer; by default the number of features of the last value read, at least 32.
        init_logit: b at the start; the authors use 3.
        min_logit: the lowest logit.
        max_logit: the highest logit.
    """

    picks = True

    def __init__(
        self, *, hidden: Count | None = None, init_logit: float = 2.0, min_logit: float = -7.0, max_logit: float = 7.0
    ) -> None:
        super().__init__(init_logit, min_logit, max_logit)
        self.hidden = hidden

    def start(self, features: Sequence[int], groups: int) -> None:
        super().start(features, groups)
        width = self.hidden or max(32, features[-1])
        self.first = nn.ModuleList([nn.Linear(size, width, bias=False) for size in features])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in features])
        self.shift = nn.Parameter(torch.zeros(width))
        self.last = nn.Linear(width, groups, bias=False)

    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Do nothing: no statistics are needed."""

    def forward(self, values: Sequence[Float[Tensor, "*positions _"] | Picked]) -> Float[Tensor, "*positions groups"]:
        terms = [self._picked(number, v) if isinstance(v, Picked) else v for number, v in enumerate(values)]
        if torch.is_grad_enabled():
            return self._logits(terms)
        parts = [self._logits(part) for part in zip(*map(_portions, terms), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _picked(self, number: int, value: Picked) -> Float[Tensor, "position _"] | Picked:
        """Project the states if there are no more of them than rows, else return the rows."""
        states, numbers = value
        return value.rows if len(states) > len(numbers) else Picked(self._term(number, states), numbers)

    def _term(self, number: int, value: Float[Tensor, "*rows _"]) -> Float[Tensor, "*rows hidden"]:
        term: Tensor = self.norms[number](self.first[number](value.float()))
        return term

    def _logits(self, values: Sequence[Float[Tensor, "*positions _"] | Picked]) -> Float[Tensor, "*positions groups"]:
        """Return the logits.

        Args:
            values: values as read, or their projections as `Picked`.
        """
        hidden: Tensor = self.shift
        for number, value in enumerate(values):
            hidden = hidden + (value.rows if isinstance(value, Picked) else self._term(number, value))
        return self.clamped(self.last(torch.relu(hidden)) / len(values))


class PaperMLP(Probe):
    """The probe of DiffMask's authors: 10 tanh(W2 tanh(W1 x)) + b, with weight norm; b is learned from 5.

    The hidden layer has a quarter of the last value's features, at least 32. Values are not standardised. The head
    saturates open: near a logit of 15 almost no gradient flows back.

    Args:
        hidden: units of the hidden layer; by default a quarter of the last value's features, at least 32.
    """

    def __init__(self, *, hidden: Count | None = None) -> None:
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
        """Do nothing: no statistics are needed."""

    def shift_logits(self, by: float) -> None:
        self.bias.data.add_(by)

    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        x = torch.cat([value.float() for value in values], -1)
        logits: Tensor = 10 * torch.tanh(self.network(x)) + self.bias
        return logits


class PerExampleLogits(Probe):
    """Per-example logits without amortisation: a parameter per example, position and group, for one batch.

    Args:
        init_logit: mean of the initial logits.
        init_std: standard deviation of the initial logits.
        min_logit: the lowest logit.
        max_logit: the highest logit.

    Attributes:
        copies: how often the batch holds each example, one repetition of the batch after another.
    """

    logits: nn.Parameter
    copies = 1

    def __init__(
        self, *, init_logit: float = 2.0, init_std: NonNegative = 0.0, min_logit: float = -7.0, max_logit: float = 5.0
    ) -> None:
        super().__init__()
        self.init_logit, self.init_std, self.min_logit, self.max_logit = init_logit, init_std, min_logit, max_logit

    def start(self, features: Sequence[int], groups: int) -> None:
        self.groups = groups

    def fit(self, values: Sequence[Float[Tensor, "positions _"]]) -> None:
        """Do nothing: no statistics are needed."""

    def begin(self, positions: Sequence[int], device: torch.device, generator: Generator | None = None) -> None:
        """Create new logits for a batch with position axes of these sizes.

        Args:
            generator: draws the initial logits if `init_std` is not 0.
        """
        drawn = torch.randn(*positions, self.groups, generator=generator) if self.init_std else torch.zeros(1)
        logits = (self.init_logit + self.init_std * drawn).clamp(self.min_logit, self.max_logit)
        self.logits = nn.Parameter(logits.expand(*positions, self.groups).clone().to(device))

    def forward(self, values: Sequence[Float[Tensor, "*positions _"]]) -> Float[Tensor, "*positions groups"]:
        logits = _clamp(self.logits, self.min_logit, self.max_logit)
        return logits if self.copies == 1 else logits.repeat(self.copies, *[1] * (logits.dim() - 1))


def _portions(value: Float[Tensor, "position *any"] | Picked) -> Sequence[Tensor | Picked]:
    if isinstance(value, Picked):
        return [Picked(value.states, part) for part in value.indices.split(_PORTION)]
    parts: Sequence[Tensor] = value.split(_PORTION)
    return parts


def _clamp(logits: Float[Tensor, "*any"], min_logit: float, max_logit: float) -> Float[Tensor, "*any"]:
    if not torch.is_grad_enabled():
        return logits.clamp(min_logit, max_logit)
    clamped: Tensor = _ProjectedClamp.apply(logits, min_logit, max_logit)  # type: ignore[no-untyped-call] # torch's own
    return clamped


class _ProjectedClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, min_logit: float, max_logit: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.range = min_logit, max_logit
        return logits.clamp(min_logit, max_logit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        min_logit, max_logit = ctx.range
        outward = ((logits >= max_logit) & (grad < 0)) | ((logits <= min_logit) & (grad > 0))
        return torch.where(outward, 0, grad), None, None


PROBES = declare("probe", Probe)
