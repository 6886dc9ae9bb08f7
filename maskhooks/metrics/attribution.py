"""Measures of attributions: distance from a known truth, and concentration."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def normalize(
    scores: Float[Tensor, "example token"], valid: Bool[Tensor, "example token"]
) -> Float[Tensor, "example token"]:
    """Normalise non-negative scores to a distribution over valid tokens; uniform if all scores are zero."""
    kept = torch.where(valid, scores, 0).double()
    total = kept.sum(1, keepdim=True)
    uniform = valid.double() / valid.sum(1, keepdim=True)
    return torch.where(total > 0, kept / total.clamp(min=1e-300), uniform).to(scores.dtype)


def kl(truth: Float[Tensor, "example token"], attribution: Float[Tensor, "example token"]) -> Float[Tensor, " example"]:
    """Return KL(truth || attribution) in nats; infinite if the attribution is zero on a token of the truth."""
    terms: Tensor = torch.special.xlogy(truth, truth) - torch.special.xlogy(truth, attribution)
    return terms.sum(1)


def js(truth: Float[Tensor, "example token"], attribution: Float[Tensor, "example token"]) -> Float[Tensor, " example"]:
    """Return the Jensen-Shannon divergence in nats, at most ln 2 (Lin 1991)."""
    middle = (truth + attribution) / 2
    return (kl(truth, middle) + kl(attribution, middle)) / 2


def entropy_ratio(
    attribution: Float[Tensor, "example token"], valid: Bool[Tensor, "example token"]
) -> Float[Tensor, " example"]:
    """Return H(attribution) / ln n over n valid tokens: 1 if uniform; NaN for fewer than two tokens."""
    entropy = -torch.special.xlogy(attribution, attribution).sum(1)
    count = valid.sum(1)
    return torch.where(count > 1, entropy / count.clamp(min=2).log(), math.nan)
