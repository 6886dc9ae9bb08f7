"""The problem that a training run solves: maskings of one model's sites, with an objective each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from maskhooks.masks.masking import Masks
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence
from maskhooks.training.objectives import Objective
from maskhooks.training.penalty import Penalty
from maskhooks.training.recipe import Recipe


@dataclass
class Problem:
    """What is trained: maskings of one model's sites, an objective each."""

    hooked: Hooked
    maskings: Sequence[Masks]
    objectives: Sequence[Objective]
    recipe: Recipe
    divergence: Divergence
    margin: float
    seed: int
    penalty: Penalty
    fit_first: Sequence[Masks] = ()  # maskings whose learned baseline is fitted before any gate, and then kept

    @property
    def parts(self) -> list[nn.Module]:
        """Every trained module once."""
        return list({id(part): part for masking in self.maskings for part in masking.modules}.values())
