"""Total variation, a distance of outputs that is never above 1."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from maskhooks.errors import UnknownDistributionError
from maskhooks.model.outputs import Outputs, compared


def total_variation(original: Outputs, masked: Outputs) -> Tensor:
    """Half the sum of |p - q| over the classes, per example: heads are summed, positions averaged."""
    return compared(original, masked, _total_variation)


def _total_variation(original: Distribution, masked: Distribution) -> Tensor:
    if isinstance(original, Categorical) and isinstance(masked, Categorical):
        return (original.probs - masked.probs).abs().sum(-1) / 2
    if isinstance(original, Bernoulli) and isinstance(masked, Bernoulli):
        return (original.probs - masked.probs).abs()
    raise UnknownDistributionError(
        f"total variation needs classes, and the outputs are {type(original).__name__}. Use divergence='kl'."
    )
