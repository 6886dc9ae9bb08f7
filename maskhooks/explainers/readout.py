"""Readout: an information bottleneck for any batch, predicted from several layers."""

from __future__ import annotations

from collections.abc import Sequence

from maskhooks.explainers.bottlenecked import Bottlenecked
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.settings.types import Natural, NonNegative, Seed
from maskhooks.sites.site import Selector, Site
from maskhooks.training.recipe import RecipeSetting


class Readout(Bottlenecked):
    """The readout bottleneck (Schulz et al. 2020, section 3.4): a network predicts the gates that `IBA` optimises.

    `fit` trains a probe for each site, which reads several layers of a clean pass and gives every unit of every
    position its share of noise. Explaining a batch then takes one clean pass.

    Args:
        hooked, sites, beta, divergence, target, recipe, seed: as `Bottlenecked` takes them.
        conditioned_on: the states that each probe reads, beside its site. Default: all hidden states with the same
            positions.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Bottlenecked`.
    """

    name = "readout"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        conditioned_on: Selector | None = None,
        beta: NonNegative | None = None,
        divergence: DivergenceSetting = "prediction-loss",
        target: Natural | None = None,
        recipe: RecipeSetting = "readout",
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, beta, divergence, target, "data", True, recipe, seed)
        self.conditioned_on = None if conditioned_on is None else hooked.required_sites(conditioned_on)
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        return [MaskingGroup([self._read_out(site)]) for site in self.sites]

    def _read_out(self, site: Site) -> Masking:
        states = self.hooked.same_positions([site]) if self.conditioned_on is None else self.conditioned_on
        reads = dict.fromkeys([site, *states])
        return self._bottleneck(site, Vote(tuple(reads), self.recipe.make_probe()), per_feature=True)
