"""DiffMask (De Cao et al. 2020): learn which positions a prediction does not need."""

from __future__ import annotations

from collections.abc import Sequence

from maskhooks.errors import SettingError
from maskhooks.explainers.learned import Learned
from maskhooks.masks.baselines import BaselineSetting
from maskhooks.masks.gates import GateSetting
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import DivergenceSetting
from maskhooks.settings.types import Positive, Seed
from maskhooks.sites.site import Selector, Site
from maskhooks.training.recipe import RecipeSetting


class DiffMask(Learned):
    """Learns gates that drop as many positions as possible while the output distribution stays within a margin.

    min E[mean P(z != 0)] subject to E[D(y || y_masked)] <= margin, over probes and baselines (De Cao et al. 2020,
    eq. 2 to 4). Hidden states: each site is masked by itself, and its gates are computed from the same state. Inputs:
    gates are the product of votes, one for each depth up to theirs, and each vote reads the input and the states of
    its depth. So there is a mask for every depth, and a position dropped at one depth stays dropped at higher ones.

    Args:
        hooked, sites, margin, gate, baseline, divergence, amortized, recipe, seed: as `Learned` takes them.
        conditioned_on: the states from which masks of `sites` are computed, depth by depth. Default: for "input" the
            hidden states with the same position axes, otherwise each site itself.
        cumulative: whether a mask conditioned on states is the product of the votes of all depths up to its own, as in
            the paper. False uses each depth's own vote alone, with its own baseline: depths then do not share one
            margin, and a position dropped at one depth may be kept at a higher one.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Learned`.
    """

    name = "diffmask"

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        conditioned_on: Selector | None = None,
        cumulative: bool = True,
        margin: Positive = 0.1,
        gate: GateSetting = "hard-concrete",
        baseline: BaselineSetting | None = None,
        divergence: DivergenceSetting = "kl",
        amortized: bool = True,
        recipe: RecipeSetting | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, margin, gate, baseline, divergence, amortized, recipe, seed)
        if conditioned_on is None and sites == "input" and amortized and hooked.sites.tagged("hidden"):
            conditioned_on = hooked.same_positions(self.sites)
        self.conditioned_on = None if conditioned_on is None else hooked.required_sites(conditioned_on)
        self.cumulative = cumulative
        self._baselines_first |= self.conditioned_on is not None
        if not amortized and self.conditioned_on is not None:
            raise SettingError("per-example logits read no states: leave out `conditioned_on`, or use amortized=True")
        self.groups = self._make_groups()

    def _make_groups(self) -> Sequence[MaskingGroup]:
        if self.conditioned_on is None:
            maskings = [self._masking(site, self._vote(site)) for site in self.sites]
        else:
            maskings = [masking for site in self.sites for masking in self._conditioned(site, self.conditioned_on)]
        return [MaskingGroup([masking]) for masking in maskings]

    def _conditioned(self, site: Site, conditioned_on: Sequence[Site]) -> list[Masking]:
        """Return a masking of one site for each depth of the states that it is conditioned on."""
        states = [state for state in conditioned_on if _depth(state) >= _depth(site)]
        if not states:
            raise SettingError(
                f"no state of `conditioned_on` comes at or after {site} (depth {_depth(site)}), so no mask can be "
                f"computed from one. Add {site} itself, or sites at higher depths."
            )
        depths = sorted(set(map(_depth, states)))
        reads = [(site, *(s for s in states if _depth(s) == depth and s != site)) for depth in depths]
        if not self.cumulative:
            return [self._masking(site, self._vote(*read), depth) for depth, read in zip(depths, reads, strict=True)]
        votes = [Vote(read, self.recipe.make_probe(number, len(depths))) for number, read in enumerate(reads)]
        baseline = self._make_baseline()
        return [Masking(site, depth, votes[: number + 1], self.gate, baseline) for number, depth in enumerate(depths)]


def _depth(site: Site) -> int:
    return site.depth or 0
