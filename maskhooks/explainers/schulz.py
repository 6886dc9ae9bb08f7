"""Schulz: an information bottleneck with one gate per position, as the DiffMask paper compares it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.explainers.bottlenecked import Bottlenecked
from maskhooks.explanations.score_labels import WEIGHT
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.passes.clean import Clean
from maskhooks.settings.types import Natural, NonNegative, Seed, Text
from maskhooks.sites.site import Selector
from maskhooks.training.recipe import RecipeSetting


class Schulz(Bottlenecked):
    """An information bottleneck with one gate per position (Schulz et al. 2020, as De Cao et al. 2020 compare it).

    Scores are the gates, the share of a position's value in the mixture, in [0, 1]; `IBA` gives bits.

    Args:
        hooked, sites, divergence, target, statistics, recipe, seed: as `Bottlenecked` takes them.
        beta: the price of information, in nats of loss per nat of mean capacity.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Bottlenecked`.
    """

    name = "schulz"
    score_label = WEIGHT

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        beta: NonNegative = 10.0,
        divergence: DivergenceSetting = "prediction-loss",
        target: Natural | None = None,
        statistics: Text = "data",
        recipe: RecipeSetting = "schulz",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, beta, divergence, target, statistics, False, recipe, seed)
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        return [MaskingGroup([self._bottleneck(site, self._vote(), per_feature=False)]) for site in self.sites]

    @torch.no_grad()
    def _score(self, clean: Clean, masking: Masking) -> Float[Tensor, "*gated"]:
        return masking.probability(clean.values, clean.places[masking.site])
