"""Calibration: shift the logits of trained masks so that their divergence on validation data reaches the margin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maskhooks.masks.group import MaskingGroup
from maskhooks.training.checkpoint import rank_of

_AIM = 0.97  # of the margin
_NEAR = 0.03  # how far from there, in log D, a shift is good enough
_FAR = math.log(10)  # and how far is too far: the margin is not what limits such a mask, unless it is stuck open
_SLOPE = -0.3  # of log D over the shift, where only one divergence is known; times the root of the sharpness
FURTHEST = 2.0  # the most that logits are shifted from where they are


def stuck(row: Mapping[str, Any], margin: float) -> bool:
    """Whether a mask keeps most positions though it is far within the margin, given its validation."""
    return bool(row["divergence"] < margin / 10 and row["expected_l0"] > 0.5)


class Calibration:
    """The search for one number to add to a group's logits, so that its divergence is just within the margin.

    Training ends near the margin, above or below. The order of positions is learned by then, and how many of them are
    dropped is one number, which is found by the secant method: log D falls nearly linearly with the logits. The shift
    is chosen on validation data as checkpoints are, among those that were measured. A mask at more than ten times the
    margin stays as it is, and so does one at less than a tenth of it that keeps less than half of the positions.

    Args:
        group: its probes shift their logits.
        margin: in nats.
        row: the group's validation, unshifted.
        sharpness: by which factor the logits were sharpened before.
    """

    def __init__(self, group: MaskingGroup, margin: float, row: Mapping[str, Any], sharpness: float = 1.0) -> None:
        self.group, self.margin = group, margin
        self._slope = _SLOPE * math.sqrt(sharpness)
        self.shift = 0.0
        self.found: list[tuple[float, Mapping[str, Any]]] = [(0.0, row)]

    @property
    def due(self) -> bool:
        """Whether another shift may be better."""
        row = self.found[-1][1]
        excess = self._excess(row)
        near = _NEAR < abs(excess) < _FAR
        return (near or stuck(row, self.margin)) and self._next() != self.shift

    def move(self) -> None:
        """Shift the logits to where the divergence should be just within the margin."""
        self._go(self._next())

    def note(self, row: Mapping[str, Any]) -> None:
        """Take the validation of the present shift."""
        self.found.append((self.shift, row))

    def settle(self) -> Mapping[str, Any]:
        """Shift the logits to the best of all that was measured, and return its validation."""
        shift, row = min(self.found, key=lambda one: rank_of([one[1]], self.margin))
        self._go(shift)
        return row

    def _go(self, shift: float) -> None:
        self.group.shift_logits(shift - self.shift)
        self.shift = shift

    def _excess(self, row: Mapping[str, Any]) -> float:
        """How far log D is above the aim."""
        return math.log(max(row["divergence"], 1e-9) / (_AIM * self.margin))

    def _next(self) -> float:
        """The zero of the line through the two measurements nearest to the aim."""
        near = sorted(((self._excess(row), shift) for shift, row in self.found), key=lambda one: abs(one[0]))
        (excess, shift), slope = near[0], self._slope
        if len(near) > 1 and near[1][1] != shift:
            slope = (near[1][0] - excess) / (near[1][1] - shift)
        if not math.isfinite(excess) or slope >= 0:  # the probe does not shift, or noise hides the slope
            return self.shift
        return shift + min(max(-excess / slope, -FURTHEST), FURTHEST)
