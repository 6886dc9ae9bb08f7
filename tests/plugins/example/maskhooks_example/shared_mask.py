"""An explainer with one mask for all data: which heads, units or layers a model needs at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maskhooks import Hooked, Site
from maskhooks.explainers.learned import Learned
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.masks.gates import GateSetting
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.probes import Probe
from maskhooks.masks.votes import Vote
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.settings.types import Positive, Seed
from maskhooks.sites.site import Selector
from maskhooks.training.recipe import RecipeSetting


class SharedLogits(Probe):
    """One logit per group, such as a head, whatever the values: c + r tanh(w), where tanh keeps it in its range."""

    def __init__(self, *, init_logit: float = 2.0, min_logit: float = -7.0, max_logit: float = 5.0) -> None:
        super().__init__()
        self.middle, self.half = (max_logit + min_logit) / 2, (max_logit - min_logit) / 2
        self.init = math.atanh((init_logit - self.middle) / self.half)

    def start(self, features: Sequence[int], groups: int) -> None:
        self.weight = nn.Parameter(torch.full((groups,), self.init))

    def fit(self, values: Sequence[Tensor]) -> None:
        """Does nothing: no statistics are needed."""

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        logits = self.middle + self.half * torch.tanh(self.weight)
        return logits.expand(*values[0].shape[:-1], -1)


class SharedMask(Learned):
    """One gate per group of a site, shared by all examples and positions, in all sites at once.

    min E[mean P(z != 0)] subject to E[D(y || y_masked)] <= margin, as in `DiffMask`, but a gate does not look at the
    example: what is closed is not needed for any of the data, and may be pruned (Voita et al. 2019 do this to heads).
    A group is an axis with a given size, `head` in "batch token (head dim) -> batch token head, head=12"; a site whose
    pattern has none has one gate, which says whether the layer is needed.

    Args:
        hooked, sites, margin, gate, baseline, divergence, recipe, seed: as `Learned` takes them; the recipe's probe is
            not used.
        together: whether all sites are masked in one pass and share the margin; False masks each by itself.
    """

    name = "shared-mask"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        together: bool = True,
        margin: Positive = 0.1,
        gate: GateSetting = "hard-concrete",
        baseline: BaselineSetting | None = None,
        divergence: DivergenceSetting = "kl",
        recipe: RecipeSetting = "stable",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, margin, gate, baseline, divergence, True, recipe, seed)
        self.together = together
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        """Called at the start of each fit: maskings with parts that have learned nothing."""
        sites = sorted(self.sites, key=lambda site: site.depth or 0)
        maskings = [self._masking(site, self._vote(site)) for site in sites]
        return [MaskingGroup(maskings)] if self.together else [MaskingGroup([masking]) for masking in maskings]

    def _vote(self, *reads: Site) -> Vote:
        return Vote(reads, SharedLogits(min_logit=self.recipe.min_logit))

    def gates(self) -> dict[str, list[float]]:
        """P(z != 0) of each group by site, once for all data; above one half it is kept."""
        self.check_ready()
        with torch.no_grad():
            logits = {str(one.site): one.votes[0].probe([torch.empty(1)]) for one in self.maskings}
            return {site: self.gate.probability(found).tolist() for site, found in logits.items()}
