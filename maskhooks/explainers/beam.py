"""Beam search: small sets of positions that leave a prediction unchanged, by closing one position after another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.explainers.smallest_sets import SmallestSets
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import KEPT_OR_ERASED
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting, Outputs
from maskhooks.passes.clean import Clean
from maskhooks.search.question import Criterion, Question
from maskhooks.search.scheduler import SearchSteps
from maskhooks.settings.types import Count, Positive, Seed
from maskhooks.sites.site import Selector


class Beam(SmallestSets):
    """Searches for a small set of positions that leaves the prediction unchanged, by dropping one position at a time.

    The search starts from all positions. In each step it drops every position of every set in the beam, one by one.
    Of the new sets it keeps the best: first those that leave the prediction unchanged, and among equals those that
    move the output least (backward elimination; Feng et al. 2018 with a beam). The result is the smallest set seen
    that leaves the prediction unchanged, and of several the one that moves the output least. It need not be minimal;
    `Erasure` finds the minimal sets.

    Args:
        hooked, sites, baseline, criterion, margin, divergence, batch_size, replay, seed: as `SmallestSets` takes them.
        width: number of sets in the beam.
    """

    name = "beam"
    score_label = KEPT_OR_ERASED

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "input",
        *,
        width: Count = 8,
        baseline: BaselineSetting = "zero",
        criterion: Criterion | None = None,
        margin: Positive | None = None,
        divergence: DivergenceSetting = "kl",
        batch_size: Count = 64,
        replay: bool = True,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            hooked,
            sites,
            baseline=baseline,
            criterion=criterion,
            margin=margin,
            divergence=divergence,
            batch_size=batch_size,
            replay=replay,
            seed=seed,
        )
        self.width = width

    def scores(self, clean: Clean) -> list[Scores]:
        found = []
        for site in self.sites:
            questions = self.questions(clean, site)
            kept = self.answers(questions, self._best, self._judged)
            found.append(self.spread_scores(clean, questions, kept, rest=1.0))
        return found

    def _judged(self, original: Outputs, masked: Outputs) -> Float[Tensor, "row 2"]:
        """Return whether each prediction is unchanged, and how far its output moves."""
        moved = self.divergence(original, masked).float().cpu()
        return torch.stack([self.unchanged(original, masked).float().cpu(), moved], 1)

    def _best(self, question: Question) -> SearchSteps[Tensor]:
        """Return 1 for the positions of the best set, 0 for the others."""
        best = torch.ones(question.positions, dtype=torch.bool)
        sets = best[None]
        for _ in range(question.positions):
            rows, closed = sets.nonzero(as_tuple=True)
            smaller = sets[rows].clone()
            smaller[torch.arange(len(rows)), closed] = False
            smaller = smaller.unique(dim=0)
            judged = (yield smaller).tolist()  # unchanged, moved
            order = sorted(range(len(smaller)), key=lambda one: (-judged[one][0], judged[one][1]))[: self.width]
            sets = smaller[order]
            if judged[order[0]][0]:
                best = sets[0]
        return best.float()
