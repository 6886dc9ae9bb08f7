"""Baselines: what a closed gate lets through."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from maskhooks.errors import SettingError
from maskhooks.masks.running_stats import update_moments
from maskhooks.plugins.kind import declare


class Baseline(nn.Module):
    """A tensor over the feature axes of its site's pattern, the same at every position.

    `start` is called once with the shape before training, `fit` with batches of values to gather statistics,
    and `forward` gives the baseline in float32; `mix` casts it to the value's dtype and device.
    """

    vector: Float[Tensor, "*features"]
    started = False

    def start(self, shape: tuple[int, ...]) -> None:
        """Allocates the vector for feature axes of this shape."""
        self.register_buffer("vector", torch.zeros(shape))

    def fit(self, values: Shaped[Tensor, "position *features"]) -> None:  # most baselines gather nothing
        """Gathers statistics from values at real positions; may be called again."""

    @abstractmethod
    def forward(self) -> Float[Tensor, "*features"]:
        """The baseline in float32, over the feature axes."""


class Zero(Baseline):
    """The zero vector."""

    def forward(self) -> Float[Tensor, "*features"]:
        return self.vector


class Mean(Baseline):
    """The mean value over real positions of the training data; `deviation` is the standard deviation."""

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
        """The standard deviation of values at real positions, over the feature axes."""
        return self.variance.sqrt()

    def forward(self) -> Float[Tensor, "*features"]:
        return self.vector


class Learned(Baseline):
    """A vector learned with the gates (De Cao et al. 2020), from the mean at real positions or from `init`.

    What is learned is its offset from there, in standard deviations of each feature, so that one learning rate serves
    sites of all scales; a feature that never varies stays. The mean is a stable start: a random one may stand in for a
    value that the model reacts to.
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
        """The standard deviation of values at the site, over the feature axes; 1 before any were seen."""
        return self.mean.deviation if self.mean.count else torch.ones_like(self.initial)

    def forward(self) -> Float[Tensor, "*features"]:
        return self.initial + self.offset * self.deviation


class Token(Baseline):
    """The value that a certain token has at the site, such as the word embedding of `[MASK]`.

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
        raise SettingError(f"the baseline given has shape {list(given.shape)}, the site's features {list(shape)}")


BASELINES = declare("baseline", Baseline)
