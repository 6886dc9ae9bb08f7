"""Leave-one-out: how far the output moves when one position is closed."""

from __future__ import annotations

import torch

from maskhooks.explainers.closing import Closing
from maskhooks.explanation import Scores
from maskhooks.step import Clean


class LeaveOneOut(Closing):
    """For each position by itself how far the output moves without it, 1 - exp(-D(y || y without it)), in [0, 1).

    D is the divergence in nats (Li et al. 2016 take the change of one probability). A position that another can stand
    in for has a score near 0, as has the other one.

    Args:
        hooked, sites, baseline, divergence, batch_size, replay, seed: as `Closing` takes them; criterion and margin
            are not looked at.
    """

    name = "leave-one-out"

    def scores(self, clean: Clean) -> list[Scores]:
        found = []
        for site in self.sites:
            values = torch.zeros(site.gating().mask_shape(clean.values[str(site)], site=site))
            for row, question in zip(values.view(len(values), -1), self.questions(clean, site), strict=True):
                if question.positions:
                    others = ~torch.eye(question.positions, dtype=torch.bool)
                    moved = -torch.expm1(-question.measured(others, self.divergence).float().clamp(min=0))
                    for unit, score in zip(question.units, moved, strict=True):
                        row[unit] = score
            found.append(self.site_scores(clean, site, site.depth or 0, values))
        return found
