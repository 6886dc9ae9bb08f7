"""The problem that a training run solves: groups of maskings of one model's sites, each with an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from maskhooks.masks.group import MaskingGroup, modules_of
from maskhooks.masks.masking import Masking
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence
from maskhooks.training.objectives import Objective
from maskhooks.training.penalty import Penalty
from maskhooks.training.recipe import Recipe

SAMPLE, CHOOSE, VALIDATE, EPOCH, BASELINE, MODEL, WARM = range(7)  # purposes of random numbers


@dataclass
class Problem:
    """What is trained: groups of maskings of one model's sites, each with an objective.

    Attributes:
        hooked: the wrapped model.
        groups: the groups, each with its own masked pass.
        objectives: one per group.
        recipe: how the groups are trained.
        divergence: distance between original and masked outputs, in nats per example.
        margin: the divergence allowed on average, in nats.
        seed: the random seed; random numbers are drawn for a purpose, such as `SAMPLE`.
        penalty: what the loss charges an example for.
        fit_first: maskings whose learned baseline is fitted before any gate, and then frozen.
    """

    hooked: Hooked
    groups: Sequence[MaskingGroup]
    objectives: Sequence[Objective]
    recipe: Recipe
    divergence: Divergence
    margin: float
    seed: int
    penalty: Penalty
    fit_first: Sequence[Masking] = ()

    @property
    def maskings(self) -> list[Masking]:
        """The maskings of all groups, in order."""
        return [masking for group in self.groups for masking in group.maskings]

    @property
    def modules(self) -> list[nn.Module]:
        """Every trained module, once."""
        return modules_of(self.maskings)
