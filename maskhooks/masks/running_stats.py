"""Running statistics: mean and variance of values seen in batches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def update_moments(
    mean: Float[Tensor, "*features"],
    variance: Float[Tensor, "*features"],
    count: Float[Tensor, ""],
    values: Float[Tensor, "position *features"],
) -> None:
    """Update running moments in place with new values (Chan et al. 1979)."""
    new, total = len(values), count + len(values)
    shift = values.mean(0) - mean
    variance.mul_(count).add_(values.var(0, unbiased=False) * new + shift**2 * (count * new / total)).div_(total)
    mean.add_(shift * (new / total))
    count.copy_(total)
