"""The penalty: what the loss of a step charges each example, its divergence or more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskhooks.model.outputs import Outputs, flip_loss, predicted
from maskhooks.plugins.kind import declare
from maskhooks.settings.types import NonNegative

_HEAVIEST = 10.0  # the largest class weight


class Penalty:
    """w(c) (D + flip_penalty O) per example: D is its divergence, O the lead of another class, w(c) a class weight.

    Masks can keep the mean divergence small by giving up predictions near a boundary and rarely predicted classes:
    then four of five predictions stay, and two of five classes are lost. O charges for lost predictions
    (`outputs.flip_loss`). With w(c) = 1 / (classes * share of c), each predicted class c counts the same; only
    predicted classes count, and w is at most 10. Per-example logits, with one multiplier per example, are not balanced.

    Args:
        flip_penalty: weight of O, in nats of divergence per nat by which another class leads.
        balance: whether to weight examples by class; this needs one predicted class per example.

    Attributes:
        counts: how often each class was predicted in the batches seen; None before the first, or without classes.
    """

    def __init__(self, flip_penalty: NonNegative = 0.0, *, balance: bool = False) -> None:
        self.flip_penalty, self.balance = flip_penalty, balance
        self.counts: Int[Tensor, " class"] | None = None

    def fit(self, outputs: Outputs) -> None:
        """Count the classes predicted in a batch of the original outputs."""
        classes = predicted(outputs) if self.balance else None
        if classes is not None:
            indices, size = classes
            counts = torch.bincount(indices.cpu(), minlength=size)
            self.counts = counts if self.counts is None else self.counts + counts

    def state_dict(self) -> dict[str, Any]:
        """Return what `fit` gathered, as tensors, numbers and strings: a resumed run does not call `fit` again."""
        return {"counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.counts = state["counts"]

    def __call__(
        self, original: Outputs, masked: Outputs, divergence: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Return the penalty, in nats.

        Args:
            divergence: the divergence of the two outputs, in nats.
        """
        charged = divergence + self.flip_penalty * flip_loss(original, masked) if self.flip_penalty else divergence
        classes = predicted(original) if self.counts is not None else None
        if self.counts is None or classes is None:
            return charged
        seen = self.counts.clamp(min=1).to(charged)
        weights = self.counts.sum() / (self.counts > 0).sum() / seen
        return charged * weights.clamp(max=_HEAVIEST)[classes[0]]


PENALTIES = declare("penalty", Penalty)
