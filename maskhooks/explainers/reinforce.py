"""REINFORCE (Williams 1992) on DiffMask's masks: gradients from samples alone, not through the model."""

from __future__ import annotations

from collections.abc import Sequence

from maskhooks.explainers.learned import Learned
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.masks.gates import GateSetting
from maskhooks.masks.group import MaskingGroup
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.settings.types import Decay, Positive, Seed
from maskhooks.sites.site import Selector
from maskhooks.training.copies import Estimate
from maskhooks.training.per_example import ScoreFunction
from maskhooks.training.recipe import RecipeSetting


class Reinforce(Learned):
    """Optimises per-example logits of Bernoulli gates by REINFORCE, without gradients through the model.

    It solves the problem of `DiffMask(amortized=False)`, with a multiplier for each example. The gradient of the
    expected penalty P is that of (P - b) log p(z), where b is the moving average of an example's penalties; the
    gradient of the sparsity is exact (De Cao et al. 2020, section 3.2, compare with this). The model runs without
    gradients, so its parts need not be differentiable. `fit` only trains a learned baseline.

    Args:
        hooked, sites, margin, gate, baseline, divergence, recipe, seed: as `Learned` takes them. The gate needs a
            log-probability, and the recipe "subset" is made for this.
        ema_decay: decay of the moving average: the weight of its previous value in each step.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Learned`.
    """

    name = "reinforce"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        margin: Positive = 0.1,
        ema_decay: Decay = 0.9,
        gate: GateSetting = "bernoulli",
        baseline: BaselineSetting | None = None,
        divergence: DivergenceSetting = "kl",
        recipe: RecipeSetting = "stable",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, margin, gate, baseline, divergence, False, recipe, seed)
        self.ema_decay = ema_decay
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        return [MaskingGroup([self._masking(site, self._vote())]) for site in self.sites]

    def _estimator(self) -> Estimate:
        return ScoreFunction(self.ema_decay)
