"""Guan: how much noise each position bears before the output changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maskhooks.explainers.learned import Learned
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import INVERSE_NOISE
from maskhooks.masks.additive_noise import AdditiveNoise
from maskhooks.masks.bottleneck import Soft
from maskhooks.masks.group import MaskingGroup
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.passes.clean import Clean
from maskhooks.settings.types import NonNegative, Seed
from maskhooks.sites.site import Selector
from maskhooks.training.objectives import Objective
from maskhooks.training.recipe import RecipeSetting
from maskhooks.training.unconstrained import NoiseEntropy


class Guan(Learned):
    """The largest noise that the output bears (Guan et al. 2019, in the form that De Cao et al. 2020 compare).

    min E[sum (y - y')^2] - weight sum_i ln(2 pi e s_i^2) / 2 for noise of deviation s_i = softplus(logit_i) on every
    feature of position i. Scores are 1 / s_i: a position that bears little noise is needed.

    Args:
        hooked, sites, divergence, amortized, recipe, seed: as `Learned` takes them. With `amortized`, `fit` trains a
            probe for any batch; otherwise there is nothing to fit.
        weight: what a nat of noise is worth; DiffMask's authors use 1 for the digits, .1 for sentiment, and 5 for
            question answering.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Learned`.
    """

    name = "guan"
    score_label = INVERSE_NOISE

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        weight: NonNegative = 0.1,
        divergence: DivergenceSetting = "squared-error",
        amortized: bool = False,
        recipe: RecipeSetting = "guan",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, None, Soft(), "zero", divergence, amortized, recipe, seed)
        self.weight = weight
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        return [MaskingGroup([AdditiveNoise(site, site.depth or 0, [self._vote(site)])]) for site in self.sites]

    def _make_objective(self) -> Objective:
        return NoiseEntropy(self.weight)

    def scores(self, clean: Clean) -> list[Scores]:
        self.optimise(clean)
        found = []
        for masking in self.maskings:
            assert isinstance(masking, AdditiveNoise)
            with torch.no_grad():
                deviation = masking.deviation(clean.values, clean.places[masking.site])
            found.append(self.site_scores(clean, masking.site, masking.depth, 1 / deviation.clamp(min=1e-6)))
        return found
