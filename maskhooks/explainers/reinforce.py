"""REINFORCE (Williams 1992) on the same masks as DiffMask's: gradients from samples alone, not through the model."""

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
from maskhooks.training.per_example import Estimate, ScoreFunction
from maskhooks.training.recipe import RecipeSetting


class Reinforce(Learned):
    """Free logits of Bernoulli gates for each batch, learned by REINFORCE instead of through the model.

    The problem is that of `DiffMask(amortized=False)`, with a multiplier for each example. The gradient of the expected
    penalty P is that of (P - b) log p(z), with the moving average of an example's penalties as its baseline b; the
    sparsity's is exact (De Cao et al. 2020, section 3.2, compare with this). The model is run without gradients, so
    that a part of it that has none is no obstacle. `fit` learns a learned baseline, and nothing else.

    Args:
        hooked, sites, margin, gate, baseline, divergence, recipe, seed: as `Learned` takes them; the gate has a
            log-probability, and the recipe "subset" is made for this.
        ema_decay: of the moving average, the weight of what was before each step.

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
