"""The penalty: what a step's loss charges an example for, its divergence or more than that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskhooks.model.outputs import Outputs, flip_loss, predicted
from maskhooks.plugins.kind import declare
from maskhooks.settings.types import NonNegative

_HEAVIEST = 10.0  # no class weighs more than so many examples, however rare


class Penalty:
    """w(c) (D + flip_penalty * O), per example: D its divergence, c the predicted class, O how far another leads it.

    A mean of divergences can be kept small by giving up predictions near a boundary, and classes that are rarely
    predicted: then four of five predictions stay, and two of five classes are lost. O charges for lost predictions
    (`outputs.flip_loss`), and with w(c) = 1 / (classes * share of c) each predicted class counts the same; classes are
    those seen, and w is at most 10. Free logits, whose examples have a multiplier each, are not balanced.

    Args:
        flip_penalty: how much O counts, in nats of divergence for each nat that another class lies ahead.
        balance: whether examples are weighted; outputs that are not one class an example are not.

    Attributes:
        counts: how often each class was predicted, in the batches seen; None before any, and where there are none.
    """

    def __init__(self, flip_penalty: NonNegative = 0.0, *, balance: bool = False) -> None:
        self.flip_penalty, self.balance = flip_penalty, balance
        self.counts: Int[Tensor, " class"] | None = None

    def fit(self, outputs: Outputs) -> None:
        """Counts the classes predicted in a batch of the model's own outputs."""
        classes = predicted(outputs) if self.balance else None
        if classes is not None:
            indices, size = classes
            counts = torch.bincount(indices.cpu(), minlength=size)
            self.counts = counts if self.counts is None else self.counts + counts

    def state_dict(self) -> dict[str, Any]:
        """What `fit` found, as tensors, numbers and texts: a run that is resumed does not call it again."""
        return {"counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.counts = state["counts"]

    def __call__(
        self, original: Outputs, masked: Outputs, divergence: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """What is charged, in nats.

        Args:
            divergence: of the two outputs.
        """
        charged = divergence + self.flip_penalty * flip_loss(original, masked) if self.flip_penalty else divergence
        classes = predicted(original) if self.counts is not None else None
        if self.counts is None or classes is None:
            return charged
        seen = self.counts.clamp(min=1).to(charged)
        weights = self.counts.sum() / (self.counts > 0).sum() / seen
        return charged * weights.clamp(max=_HEAVIEST)[classes[0]]


PENALTIES = declare("penalty", Penalty)
