"""Leave-one-out: how far the output moves if one position is closed."""

from __future__ import annotations

import torch
from torch import Tensor

from maskhooks.explainers.closing import Closing
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import DIVERGENCE
from maskhooks.passes.clean import Clean
from maskhooks.search.question import Question
from maskhooks.search.scheduler import SearchSteps


class LeaveOneOut(Closing):
    """Scores each position by how far the output moves without it: 1 - exp(-D(y || y_without)), in [0, 1).

    D is the divergence in nats (Li et al. 2016 take the change of one probability). If two positions can replace each
    other, both score near 0.

    Args:
        hooked, sites, baseline, divergence, batch_size, replay, seed: as `Closing` takes them.
    """

    name = "leave-one-out"
    score_label = DIVERGENCE

    def scores(self, clean: Clean) -> list[Scores]:
        found = []
        for site in self.sites:
            questions = self.questions(clean, site)
            moved = self.answers(questions, _each, self.divergence)
            found.append(self.spread_scores(clean, questions, moved, rest=0.0))
        return found


def _each(question: Question) -> SearchSteps[Tensor]:
    """Ask how far the output moves without each position."""
    if not question.positions:
        return torch.zeros(0)
    moved = yield ~torch.eye(question.positions, dtype=torch.bool)
    return -torch.expm1(-moved.float().clamp(min=0))
