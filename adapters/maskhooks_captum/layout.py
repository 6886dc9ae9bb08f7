"""Layout: a site's value as Captum takes it, and Captum's attributions as scores of gated positions."""

from __future__ import annotations

import functools
import math

import einops
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from maskhooks.errors import BatchError, NonFiniteError, PatternError, SettingError
from maskhooks.masks.baselines import Baseline
from maskhooks.model.outputs import count
from maskhooks.passes.clean import Clean
from maskhooks.sites.site import Site


class Layout:
    """A site's value with the batch axis first; one whole value if rows belong to examples by an index.

    Args:
        clean: the batch and its clean pass, which has read the site.
        site: the site.

    Attributes:
        value: the value, `(batch, ...)` or `(1, row, ...)`.
        whole: whether it is the latter, as with the messages of several graphs.
        examples: number of examples in the batch.

    Raises:
        SettingError: the value holds integers.
        NonFiniteError: the value is NaN or infinite at a valid position.
        PatternError: the batch axis is not a dimension by itself.
        BatchError: the value has rows for another number of examples than the outputs.
    """

    def __init__(self, clean: Clean, site: Site) -> None:
        self.site, self.pattern = site, site.gating()
        self._places, self._original = clean.places[site], clean.values[site].detach()
        self._sizes = self.pattern.shape(self._original, site=site)
        self.whole, self.examples = self._places.example_index is not None, count(clean.outputs)
        self._check()
        self._batch = 0 if self.whole else self.pattern.axes.index(self.pattern.positions[:1])
        self.value: Tensor = self.front(self._original).clone()  # also of an inference tensor
        if len(self.value) != (1 if self.whole else self.examples):
            raise BatchError(
                f"site {site} has a value of {len(self.value)} rows, but there are {self.examples} outputs. Choose a "
                "site with a row for each example, or say whose they are: wrap(model, example_index=lambda batch: ...)"
            )

    def _check(self) -> None:
        site, value = self.site, self._original
        if not value.is_floating_point():
            raise SettingError(
                f"site {site} has values of type {value.dtype}, which have no gradient and no baseline between. "
                "Explain a later site, such as the embedding of tokens"
            )
        if not self.whole and self.pattern.positions[:1] not in self.pattern.axes:
            raise PatternError(
                f"site {site}: Captum needs the batch axis by itself, but the pattern is '{self.pattern}'. Take "
                f"{self.pattern.positions[0]!r} out of the parentheses",
                site=site,
            )
        if not bool(torch.where(self.pattern.spread(self.valid, value), value, 0).isfinite().all()):
            raise NonFiniteError(
                f"site {site} has values that are NaN or infinite, such as masked attention scores. Captum would "
                "return NaN for all positions: explain another site",
                site=site,
            )

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of the feature axes."""
        return self.pattern.feature_shape(self._original, site=self.site)

    @functools.cached_property
    def valid(self) -> Bool[Tensor, "*gated"]:
        """Which gates are at valid positions."""
        left, gated = " ".join(self.pattern.positions), self.pattern.gated
        right = " ".join(axis if axis in self.pattern.positions else "1" for axis in gated)
        found: Tensor = einops.rearrange(self._places.valid, f"{left} -> {right}")
        return found.expand([self._sizes[axis] for axis in gated])

    def front(self, value: Shaped[Tensor, "*value"]) -> Shaped[Tensor, "row *front"]:
        """Return a tensor like the site's value with the batch axis first."""
        return value[None] if self.whole else value.movedim(self._batch, 0)

    def back(self, value: Shaped[Tensor, "row *front"]) -> Shaped[Tensor, "*value"]:
        """The inverse of `front`."""
        return value[0] if self.whole else value.movedim(0, self._batch)

    def baseline(self, given: Tensor | Baseline) -> Shaped[Tensor, "row *front"]:
        """Return the baseline like `value`. Padding, which is never replaced, has its own value.

        Args:
            given: a baseline that has been started, or a tensor of the shape of the site's features or of its value.

        Raises:
            SettingError: the tensor has another shape.
        """
        pattern, value = self.pattern, self._original
        vector = given.detach() if isinstance(given, Tensor) else given().detach()
        if vector.shape != value.shape:
            if tuple(vector.shape) != self.features:
                raise SettingError(
                    f"the baseline has shape {list(vector.shape)}, but the value of site {self.site} has shape "
                    f"{list(value.shape)}, and its features {list(self.features)}. Give a tensor of one of these shapes"
                )
            vector = pattern.spread_features(vector, value)
        valid = pattern.spread(self.valid, value)
        return self.front(torch.where(valid, vector.to(value), value)).clone()

    @functools.cached_property
    def units(self) -> Int[Tensor, "row *front"]:
        """For each element of `value` the number of its unit within the example, from 0; broadcastable.

        Units are gated positions, or what the task gates together. Padding has 0: its baseline is its own value.
        """
        gates = [self._sizes[axis] for axis in self.pattern.gated]
        numbers = torch.arange(math.prod(gates), device=self._original.device).view(gates)
        if self._places.units is not None:
            numbers = self._places.units.shared(numbers.double(), self.pattern).long()
        found = torch.zeros_like(numbers)
        at = self.pattern.gated.index(self.pattern.positions[0])
        rows = [(numbers, self.valid, found)]
        if not self.whole:
            rows = list(zip(*(part.unbind(at) for part in rows[0]), strict=True))
        for own, valid, into in rows:
            into[valid] = torch.unique(own[valid], return_inverse=True)[1]
        return self.front(self.pattern.spread(found, self._original))

    def windows(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shape of a window over neighbouring positions, and its strides, over the axes after the first.

        Args:
            size: number of positions along each axis; a group, such as a head, is always by itself.

        Raises:
            SettingError: positions are gated together.
            PatternError: the features of a position are not next to each other.
        """
        if self._places.units is not None:
            raise SettingError(
                f"site {self.site} gates positions together, which windows would cut. Use feature-ablation, or wrap "
                "the model without units="
            )
        windows, strides = [], []
        for dimension, axes in enumerate(self.pattern.axes):
            gated = [axis for axis in axes if axis in self.pattern.gated]
            if tuple(gated) != axes[: len(gated)]:
                raise PatternError(
                    f"site {self.site}: a window needs the features of a position next to each other, but the pattern "
                    f"is '{self.pattern}'. Use feature-ablation",
                    site=self.site,
                )
            inner = math.prod(self._sizes[axis] for axis in axes if axis not in gated)
            several = len(gated) == 1 and gated[0] in self.pattern.positions
            if self.whole or dimension != self._batch:
                windows.append(inner * (min(size, self._sizes[gated[0]]) if several else 1))
                strides.append(inner)
        return tuple(windows), tuple(strides)

    def summed(self, attributions: Float[Tensor, "row *front"]) -> Float[Tensor, "*gated"]:
        """Return the sum over the features of each unit."""
        scores = self._gates(attributions, "sum")
        units = self._places.units
        if units is None:
            return scores
        heads = self._places.unit_heads.to(scores)
        left = " ".join(self.pattern.positions)
        right = " ".join(axis if axis in self.pattern.positions else "1" for axis in self.pattern.gated)
        heads = einops.rearrange(heads, f"{left} -> {right}").expand_as(scores)
        share = units.mean(heads, self.pattern)  # one over the number of positions
        return torch.where(share > 0, units.mean(scores, self.pattern) / share, 0)

    def taken(self, attributions: Float[Tensor, "row *front"]) -> Float[Tensor, "*gated"]:
        """Return the score that all features of a unit have."""
        return self._gates(attributions, "max")

    def _gates(self, attributions: Tensor, how: str) -> Tensor:
        value = self.back(attributions.detach())
        value = value if value.dtype == torch.float64 else value.float()
        found: Tensor = einops.reduce(value, self.pattern.arrow, how, **self.pattern.sizes).float()
        if not bool(torch.where(self.valid, found, 0).isfinite().all()):
            raise NonFiniteError(
                f"site {self.site}: attributions are NaN or infinite. Look for infinite values after the site, such "
                "as masked attention scores, or take another method",
                site=self.site,
            )
        return torch.where(self.valid, found, 0)
