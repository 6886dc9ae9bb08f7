"""Gate samples of one masked pass, and the values they mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from maskhooks.masks.mix import mix
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.pattern import Pattern


@dataclass(frozen=True)
class GateSamples:
    """Samples of a batch's gates, at one or several sites; objectives read them.

    Attributes:
        sample: z in [0, 1]; 1 at padding.
        log_open: log P(z != 0) in nats.
        counted: which gates count: none at padding, and only the first of positions gated together.
        example_index: the example index of each row; None if the first axis is the batch axis.
        nats: what is measured of noise at each gate, in nats: the capacity of a bottleneck, or the entropy of noise
            that is added; None without noise.
    """

    sample: Float[Tensor, "*gates"]
    log_open: Float[Tensor, "*gates"]
    counted: Bool[Tensor, "*gates"]
    example_index: ExampleIndex | None = None
    nats: Float[Tensor, "*gates"] | None = None

    def total(self, numbers: Shaped[Tensor, "*gates"]) -> Shaped[Tensor, " batch"]:
        """Sum a number per gate over each example's counted gates."""
        counted = self.counted.flatten(1) if self.counted.dim() > 1 else self.counted[:, None]
        sums = torch.where(counted, numbers.reshape(counted.shape), 0).sum(1)
        return sums if self.example_index is None else self.example_index.sums(sums)

    def per_example(self, numbers: Float[Tensor, "*gates"]) -> Float[Tensor, " batch"]:
        """Average a number per gate over each example's counted gates."""
        return self.total(numbers) / self.total(torch.ones_like(numbers)).clamp(min=1)

    @property
    def expected_l0(self) -> Float[Tensor, " batch"]:
        """The mean P(z != 0) over counted gates: the expected fraction kept."""
        return self.per_example(self.log_open.exp())

    @staticmethod
    def flattened(parts: Sequence[GateSamples]) -> GateSamples:
        """Return the gates of all parts along one axis, each with its example index."""
        indices = []
        for part in parts:
            rows = len(part.sample)
            own = (
                torch.arange(rows, device=part.sample.device)
                if part.example_index is None
                else part.example_index.index
            )
            indices.append(own.repeat_interleave(part.sample.numel() // max(1, rows)))
        sample, log_open, counted = (
            torch.cat([column.flatten() for column in columns])
            for columns in zip(*((part.sample, part.log_open, part.counted) for part in parts), strict=True)
        )
        measured = [part.nats.flatten() for part in parts if part.nats is not None]
        nats = torch.cat(measured) if len(measured) == len(parts) else None
        first = parts[0]
        count = len(first.sample) if first.example_index is None else first.example_index.count
        return GateSamples(sample, log_open, counted, ExampleIndex(torch.cat(indices), count), nats)


@dataclass(frozen=True, kw_only=True)
class Masked(GateSamples):
    """A value masked at one site.

    Attributes:
        original: the value h, as read in the clean pass.
        baseline: b, broadcastable against the value.
        pattern: how gates and features map to the value's axes.
    """

    original: Shaped[Tensor, "*value"]
    baseline: Shaped[Tensor, "..."]
    pattern: Pattern

    @property
    def replaced(self) -> Shaped[Tensor, "*value"]:
        """The masked value, z h + (1 - z) b. If an earlier site is masked too, the pass mixes the value it computes."""
        return mix(self.original, self.pattern.spread(self.sample, self.original), self.baseline)
