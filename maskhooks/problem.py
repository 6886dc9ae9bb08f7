"""The problem that a training run solves: maskings of one model's sites, with an objective each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from maskhooks.checkpoint import Measure
from maskhooks.hooked import Hooked
from maskhooks.masking import Masks, needs
from maskhooks.objectives import Objective
from maskhooks.outputs import Divergence
from maskhooks.penalty import Penalty
from maskhooks.recipe import Recipe
from maskhooks.replay import Replay
from maskhooks.seeds import generator
from maskhooks.step import clean_pass


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


def evaluate_batch(problem: Problem, batch: Any, measures: Sequence[Measure], replay: Replay | None, seed: int) -> None:
    """Adds a batch to measures: one clean pass, and a masked pass from each masked site onward."""
    clean = clean_pass(problem.hooked, batch, *needs([measure.masking for measure in measures]), replay)
    for number, measure in enumerate(measures):
        measure.add(problem.hooked, clean, problem.divergence, generator(seed, number))
