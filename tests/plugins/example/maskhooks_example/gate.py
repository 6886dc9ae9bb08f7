"""A gate that is open where its logit is positive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maskhooks.masks.gates import Gate


@dataclass(frozen=True)
class Step(Gate):
    """z = 1 where the logit exceeds `threshold`, else 0; straight-through gradient."""

    threshold: float = 0.0

    def sample(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        logits = logits.float()
        return (logits > self.threshold).float() + (logits - logits.detach())

    def log_open(self, logits: Tensor) -> Tensor:
        return (logits.float() > self.threshold).float().log()

    def log_prob(self, sample: Tensor, logits: Tensor) -> Tensor:
        return (sample == (logits.float() > self.threshold)).float().log().to(torch.float32)
