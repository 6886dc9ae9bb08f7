"""Checkpoints: what maskings measure on validation data, and which of their states is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from maskhooks.masks.masking import Masks
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence, agreement
from maskhooks.passes.forward import Clean, masked_pass


@dataclass
class Measure:
    """Means over examples of what one masking does: divergence in nats, fraction kept, agreement of predictions."""

    masking: Masks
    rounded: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def add(self, hooked: Hooked, clean: Clean, divergence: Divergence, source: Generator) -> None:
        """Adds a batch, with sampled gates and, where asked, with gates rounded at one half."""
        self._add("", hooked, clean, divergence, source, None)
        if self.rounded:
            self._add("rounded_", hooked, clean, divergence, source, 0.5)

    def _add(
        self,
        name: str,
        hooked: Hooked,
        clean: Clean,
        divergence: Divergence,
        source: Generator,
        rounded: float | None,
    ) -> None:
        masked, outputs = masked_pass(hooked, clean, self.masking, source, rounded=rounded)
        kept = masked.expected_l0 if rounded is None else masked.per_example(masked.sample)
        found = {
            f"{name}divergence": divergence(clean.outputs, outputs),
            "rounded_kept" if name else "expected_l0": kept,
            f"{name}agreement": agreement(clean.outputs, outputs),
        }
        for key, values in found.items():
            self.sums[key] = self.sums.get(key, 0.0) + values.sum().item()
        if not name:
            self.count += len(kept)

    def add_up(self, totals: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Takes counts and sums of several processes in place of its own."""
        self.count, self.sums = 0, {}
        for count, sums in totals:
            self.count += count
            for key, value in sums.items():
                self.sums[key] = self.sums.get(key, 0.0) + value

    def row(self) -> dict[str, Any]:
        means = {key: total / self.count for key, total in self.sums.items()}
        return {"site": self.masking.label, "depth": self.masking.depth, **means}


@dataclass
class Fitted:
    """What a training run leaves behind.

    Attributes:
        log: a row a step: step, epoch, site, depth, multiplier, divergence (nats), expected_l0 (fraction), agreement.
        validation: a row a validation and masking: step, site, depth, divergence, expected_l0, agreement.
        within_margin: whether the chosen state keeps the mean divergence of every masking within the margin; None
            without validation data.
        chosen: by masking the step whose state was kept.
        stopped: why training ended.
        cause: what ended it before its time, to be raised once the explainer is in order.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    within_margin: bool | None = None
    chosen: dict[str, int] = field(default_factory=dict)
    stopped: str = ""
    cause: BaseException | None = None


class Checkpoint:
    """The best state so far of maskings that share modules: the sparsest within the margin, else the nearest to it."""

    def __init__(self, maskings: Sequence[Masks], margin: float) -> None:
        self.maskings = list(maskings)
        self.margin = margin
        self.step: int | None = None
        self._rank: tuple[bool, float] | None = None
        self._state: list[dict[str, Tensor]] = []

    def __str__(self) -> str:
        return ", ".join(str(masking) for masking in self.maskings)

    @property
    def within(self) -> bool:
        """Whether the best state keeps every masking's mean divergence within the margin."""
        return self._rank is not None and not self._rank[0]

    def compare(self, step: int, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Keeps the present state if it is better, given a row per masking; says whether it was."""
        found = list(rows)
        excess = max(row["divergence"] for row in found) - self.margin
        sparsity = sum(row["expected_l0"] for row in found) / len(found)
        rank = (excess > 0, excess if excess > 0 else sparsity)
        if self._rank is not None and rank >= self._rank:
            return False
        self.step, self._rank = step, rank
        self._state = [copy.deepcopy(part.state_dict()) for part in self._parts()]
        return True

    def snapshot(self) -> dict[str, Any]:
        """What it holds, as a tree of tensors and numbers."""
        return {"step": self.step, "rank": self._rank, "state": self._state}

    def take(self, snapshot: Mapping[str, Any]) -> None:
        """Holds again what `snapshot` gave."""
        rank = snapshot["rank"]
        self.step, self._state = snapshot["step"], snapshot["state"]
        self._rank = None if rank is None else (rank[0], rank[1])

    def restore(self) -> None:
        """Puts the best state back."""
        for part, state in zip(self._parts(), self._state, strict=True):
            part.load_state_dict(state)

    def _parts(self) -> list[torch.nn.Module]:
        return list({id(part): part for masking in self.maskings for part in masking.modules}.values())


def grouped(maskings: Sequence[Masks]) -> list[list[Masks]]:
    """Maskings that share modules, together; the state of each group is chosen by itself."""
    groups: list[list[Masks]] = []
    for masking in maskings:
        mine = {id(part) for part in masking.modules}
        joined = [group for group in groups if any(id(part) in mine for other in group for part in other.modules)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(other for group in joined for other in group), masking])
    return groups
