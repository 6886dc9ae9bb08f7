"""Baselines: the values that replace masked ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.masks.running_stats import update_moments
from maskhooks.plugins.kind import declare
from maskhooks.settings.types import NonNegative
from maskhooks.sites.pattern import Pattern


class Baseline(nn.Module):
    """A tensor over the feature axes of its site's pattern, the same at every position.

    `start` is called once, before training, with the shape. `fit` gathers statistics from batches of values.
    `forward` returns the baseline in float32; `mix` casts it to the value's dtype and device. A random baseline draws
    in `drawn`, and `forward` is its mean.
    """

    vector: Float[Tensor, "*features"]
    started = False
    random = False  # whether it draws

    def __init__(self) -> None:  # a module takes arguments of any name; a baseline has the settings that it names
        super().__init__()

    def start(self, shape: tuple[int, ...]) -> None:
        """Allocate the vector for feature axes of this shape."""
        self.register_buffer("vector", torch.zeros(shape))

    def fit(self, values: Shaped[Tensor, "position *features"]) -> None:  # most baselines gather nothing
        """Gather statistics from values at valid positions. May be called more than once."""

    @abstractmethod
    def forward(self) -> Float[Tensor, "*features"]:
        """The baseline in float32, over the feature axes."""

    def drawn(
        self, value: Shaped[Tensor, "*value"], pattern: Pattern, normal: Float[Tensor, "*value"] | None = None
    ) -> Float[Tensor, "..."]:
        """Return what replaces a value, in a shape that broadcasts against it.

        Args:
            normal: standard normal numbers in the value's shape, which a random baseline makes its draw of; without
                them, it returns its mean.
        """
        return pattern.spread_features(self(), value)


class Zero(Baseline):
    """The zero vector."""

    def forward(self) -> Float[Tensor, "*features"]:
        return self.vector


class Mean(Baseline):
    """The mean value at valid positions of the training data; `deviation` is the standard deviation."""

    count: Float[Tensor, ""]
    variance: Float[Tensor, "*features"]

    def start(self, shape: tuple[int, ...]) -> None:
        super().start(shape)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("variance", torch.zeros(shape))

    def fit(self, values: Shaped[Tensor, "position *features"]) -> None:
        if len(values):
            update_moments(self.vector, self.variance, self.count, values.float())

    @property
    def deviation(self) -> Float[Tensor, "*features"]:
        """The standard deviation of values at valid positions, over the feature axes."""
        return self.variance.sqrt()

    def forward(self) -> Float[Tensor, "*features"]:
        return self.vector


class Noise(Mean):
    """Gaussian noise with the mean and standard deviation of values at valid positions of the training data.

    Each position and feature gets its own draw. With gates between 0 and 1 it is the noise of an information
    bottleneck (Schulz et al. 2020).

    Args:
        min_deviation: the lowest standard deviation of a feature.
    """

    random = True

    def __init__(self, *, min_deviation: NonNegative = 0.01) -> None:
        super().__init__()
        self.min_deviation = min_deviation

    @property
    def deviation(self) -> Float[Tensor, "*features"]:
        return super().deviation.clamp(min=self.min_deviation)

    def drawn(
        self, value: Shaped[Tensor, "*value"], pattern: Pattern, normal: Float[Tensor, "*value"] | None = None
    ) -> Float[Tensor, "..."]:
        mean = super().drawn(value, pattern)
        return mean if normal is None else mean + pattern.spread_features(self.deviation, value) * normal


class Learned(Baseline):
    """A vector learned with the gates (De Cao et al. 2020), starting at `init` or at the mean over valid positions.

    The parameter is an offset from that start, in standard deviations of each feature, so one learning rate suits
    sites of any scale. A feature that never varies stays fixed. The mean is a stable start: a random vector may act
    like a value that the model reacts to.

    Args:
        init: the vector to start from, over the feature axes; None for the mean over valid positions.
    """

    offset: nn.Parameter
    initial: Float[Tensor, "*features"]

    def __init__(self, init: Float[Tensor, "*features"] | None = None) -> None:
        super().__init__()
        self.init = init
        self.mean = Mean()

    def start(self, shape: tuple[int, ...]) -> None:
        self.mean.start(shape)
        self.offset = nn.Parameter(torch.zeros(shape))
        self.register_buffer("initial", torch.zeros(shape))
        if self.init is not None:
            _check_shape(self.init, shape)
            self.initial.copy_(self.init.detach())

    def fit(self, values: Shaped[Tensor, "position *features"]) -> None:
        self.mean.fit(values)
        if self.init is None:
            self.initial.copy_(self.mean.vector)

    @property
    def deviation(self) -> Float[Tensor, "*features"]:
        """The standard deviation of each feature at the site; 1 before `fit` sees values."""
        return self.mean.deviation if self.mean.count else torch.ones_like(self.initial)

    def forward(self) -> Float[Tensor, "*features"]:
        return self.initial + self.offset * self.deviation


class Token(Baseline):
    """The value of one token at the site, such as the word embedding of `[MASK]`.

    Args:
        value: the vector, over the feature axes.
    """

    def __init__(self, value: Float[Tensor, "*features"] | None = None) -> None:
        super().__init__()
        self.value = value

    def start(self, shape: tuple[int, ...]) -> None:
        super().start(shape)
        if self.value is None:
            raise SettingError("the token baseline needs the token's vector: Token(embedding.weight[mask_id])")
        _check_shape(self.value, shape)
        self.vector.copy_(self.value.detach())

    def forward(self) -> Float[Tensor, "*features"]:
        return self.vector


def _check_shape(given: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(given.shape) != tuple(shape):
        raise SettingError(
            f"the baseline has shape {list(given.shape)}, but the site's features have shape {list(shape)}. Give a "
            "vector of that shape"
        )


BASELINES = declare("baseline", Baseline)
#: How an explainer takes a baseline: its name, a mapping of its name and settings, or a `Baseline`.
BaselineSetting = Annotated[str | Mapping[str, Any] | Baseline, BASELINES]
