"""What a masked pass did to one batch: the samples of its gates, and the value that went on at each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from maskhooks.sites.example_index import ExampleIndex


@dataclass(frozen=True)
class GateSamples:
    """Samples of a batch's gates, at one site or at several in a row; objectives read them.

    Attributes:
        sample: z in [0, 1]; 1 at positions that are not real.
        log_open: log P(z != 0) in nats.
        real: which gates count: those at real positions, and of positions gated together the first alone.
        examples: the example of each row; None where the first axis is the batch.
    """

    sample: Float[Tensor, "*gates"]
    log_open: Float[Tensor, "*gates"]
    real: Bool[Tensor, "*gates"]
    examples: ExampleIndex | None = None

    def total(self, numbers: Shaped[Tensor, "*gates"]) -> Shaped[Tensor, " batch"]:
        """The sum over an example's real gates of any number per gate."""
        real = self.real.flatten(1) if self.real.dim() > 1 else self.real[:, None]
        sums = torch.where(real, numbers.reshape(real.shape), 0).sum(1)
        return sums if self.examples is None else self.examples.sums(sums)

    def per_example(self, numbers: Float[Tensor, "*gates"]) -> Float[Tensor, " batch"]:
        """The mean over an example's real gates of any number per gate."""
        return self.total(numbers) / self.total(torch.ones_like(numbers)).clamp(min=1)

    @property
    def expected_l0(self) -> Float[Tensor, " batch"]:
        """The mean P(z != 0) over real positions, the fraction kept in expectation."""
        return self.per_example(self.log_open.exp())

    @staticmethod
    def in_a_row(parts: Sequence[GateSamples]) -> GateSamples:
        """The gates of several sites in one row, each with its example; those of one site are left as they are."""
        return parts[0] if len(parts) == 1 else _row(parts)

    @property
    def flat(self) -> GateSamples:
        """The gates in one row, each with its example."""
        return _row([self])


@dataclass(frozen=True, kw_only=True)
class Masked(GateSamples):
    """A value masked at one site.

    Attributes:
        original: the value h.
        replaced: the value that goes on, z h + (1 - z) b.
        baseline: b over the feature axes.
    """

    original: Shaped[Tensor, "*value"]
    replaced: Shaped[Tensor, "*value"]
    baseline: Shaped[Tensor, "*features"]


def _row(parts: Sequence[GateSamples]) -> GateSamples:
    indices = []
    for part in parts:
        rows = len(part.sample)
        own = torch.arange(rows, device=part.sample.device) if part.examples is None else part.examples.index
        indices.append(own.repeat_interleave(part.sample.numel() // max(1, rows)))
    sample, log_open, real = (
        torch.cat([column.flatten() for column in columns])
        for columns in zip(*((part.sample, part.log_open, part.real) for part in parts), strict=True)
    )
    first = parts[0]
    count = len(first.sample) if first.examples is None else first.examples.count
    return GateSamples(sample, log_open, real, ExampleIndex(torch.cat(indices), count))
