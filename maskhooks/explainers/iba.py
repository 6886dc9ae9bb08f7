"""IBA: the information of each position that a prediction needs, by a bottleneck with a gate per unit."""

from __future__ import annotations

from collections.abc import Sequence

from maskhooks.explainers.bottlenecked import Bottlenecked
from maskhooks.masks.group import MaskingGroup
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.settings.types import Natural, NonNegative, Seed, Text
from maskhooks.sites.site import Selector
from maskhooks.training.recipe import RecipeSetting


class IBA(Bottlenecked):
    """The information bottleneck for attribution (Schulz et al. 2020; for transformers Jiang et al. 2020).

    Each unit of each position, such as a channel or a hidden unit, gets its own share of noise, optimised for each
    example in `explain`. `fit` only takes the noise's statistics from data.

    Args:
        hooked, sites, beta, divergence, target, statistics, recipe, seed: as `Bottlenecked` takes them.
        smoothing: standard deviation, in positions, of a Gaussian blur over rows and columns, channel by channel; 1 in
            the published code for images, 0 for none.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Bottlenecked`.
    """

    name = "iba"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        beta: NonNegative | None = None,
        smoothing: NonNegative = 0.0,
        divergence: DivergenceSetting = "prediction-loss",
        target: Natural | None = None,
        statistics: Text = "data",
        recipe: RecipeSetting = "iba",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, beta, divergence, target, statistics, False, recipe, seed)
        self.smoothing = smoothing
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        return [
            MaskingGroup([self._bottleneck(site, self._vote(), per_feature=True, smoothing=self.smoothing)])
            for site in self.sites
        ]
