"""Checkpoints: keep the best state of the maskings, measured on validation data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from maskhooks.masks.group import MaskingGroup, modules_of


def rank_of(rows: Sequence[Mapping[str, Any]], margin: float) -> tuple[bool, float]:
    """Return how good a state is, given a row per group: the lower, the better."""
    excess = max(row["divergence"] for row in rows) - margin
    sparsity = sum(row["expected_l0"] for row in rows) / len(rows)
    return excess > 0, excess if excess > 0 else sparsity


class Checkpoint:
    """The best state so far of groups that share modules: the sparsest within the margin, else the closest to it."""

    def __init__(self, groups: Sequence[MaskingGroup], margin: float) -> None:
        self.groups = list(groups)
        self.margin = margin
        self.step: int | None = None
        self._rank: tuple[bool, float] | None = None
        self._state: list[dict[str, Tensor]] = []

    def __str__(self) -> str:
        return ", ".join(map(str, self.groups))

    @property
    def within(self) -> bool:
        """Whether the best state keeps every group's mean divergence within the margin."""
        return self._rank is not None and not self._rank[0]

    def compare(self, step: int, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Keep the current state if it is better, or without a margin later; return whether it is.

        Args:
            rows: a row per group.
        """
        rank = rank_of(list(rows), self.margin) if math.isfinite(self.margin) else (False, -float(step))
        if self._rank is not None and rank >= self._rank:
            return False
        self.step, self._rank = step, rank
        self._state = [copy.deepcopy(module.state_dict()) for module in self._modules()]
        return True

    def snapshot(self) -> dict[str, Any]:
        """Return the checkpoint as a tree of tensors and numbers."""
        return {"step": self.step, "rank": self._rank, "state": self._state}

    def take(self, snapshot: Mapping[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        rank = snapshot["rank"]
        self.step, self._state = snapshot["step"], snapshot["state"]
        self._rank = None if rank is None else (rank[0], rank[1])

    def restore(self) -> None:
        """Load the best state into the modules."""
        for module, state in zip(self._modules(), self._state, strict=True):
            module.load_state_dict(state)

    def _modules(self) -> list[nn.Module]:
        return modules_of(masking for group in self.groups for masking in group.maskings)
