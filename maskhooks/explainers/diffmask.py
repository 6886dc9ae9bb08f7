"""DiffMask (De Cao et al. 2020): learn which positions a prediction does not need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskhooks.errors import SettingError
from maskhooks.explainers.learned import Learned
from maskhooks.masks.baselines import Baseline
from maskhooks.masks.gates import Gate
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Divergence, kl
from maskhooks.sites.site import Selector, Site
from maskhooks.training.recipe import Recipe


class DiffMask(Learned):
    """Gates that drop as many positions as possible while the output distribution stays within a margin.

    min E[mean P(z != 0)] subject to E[D(y || y_masked)] <= margin, over probes and baselines (De Cao et al. 2020,
    eq. 2 to 4). Hidden states: each site is masked by itself, its gates read from the same state. Inputs: masked with
    the product of votes, one for each depth up to theirs, each reading input and states; so every depth has a mask, and
    what is dropped at one depth stays dropped further up. States of one depth are read together.

    Args:
        hooked, sites, margin, gate, baseline, divergence, amortized, recipe, seed: as `Learned` takes them.
        given: the states on which masks of `sites` are conditioned, depth by depth. Default: for "input" the sites
            tagged hidden that have the same position axes, for anything else each site itself.
        product: whether masks conditioned on states are the product of the votes of all depths up to theirs, as in the
            paper; False takes each depth's own vote alone, with a baseline of its own, so that depths do not share one
            margin, and what is dropped at one depth may be kept further up.

    Raises:
        SettingError, UnknownSiteError, PatternError: as with `Learned`.
    """

    name = "diffmask"
    own_settings = ("amortized", "cumulative")

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        conditioned_on: Selector | None = None,
        cumulative: bool = True,
        margin: float = 0.1,
        gate: str | Gate = "hard-concrete",
        baseline: str | Baseline | None = None,
        divergence: Divergence = kl,
        amortized: bool = True,
        recipe: str | Recipe = "stable",
        seed: int = 0,
    ) -> None:
        super().__init__(hooked, sites, margin, gate, baseline, divergence, amortized, recipe, seed)
        if conditioned_on is None and sites == "input" and amortized and hooked.sites.tagged("hidden"):
            conditioned_on = hooked.alike(self.sites)
        self.conditioned_on = None if conditioned_on is None else hooked.needed(conditioned_on)
        self.cumulative = cumulative
        self._baselines_first |= self.conditioned_on is not None
        if not amortized and self.conditioned_on is not None:
            raise SettingError("free logits read no states: leave out `given`, or use amortized=True")
        self.groups = self._make_groups()

    def settings(self) -> dict[str, Any]:
        conditioned_on = None if self.conditioned_on is None else [site.to_dict() for site in self.conditioned_on]
        return {**super().settings(), "conditioned_on": conditioned_on, "cumulative": self.cumulative}

    @classmethod
    def _own(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        conditioned_on = settings["conditioned_on"]
        conditions = None if conditioned_on is None else [Site.from_dict(site) for site in conditioned_on]
        return {**super()._own(settings), "conditioned_on": conditions}

    def _make_groups(self) -> Sequence[MaskingGroup]:
        if self.conditioned_on is None:
            maskings = [self._masking(site, self._vote(site)) for site in self.sites]
        else:
            maskings = [masking for site in self.sites for masking in self._conditioned(site, self.conditioned_on)]
        return [MaskingGroup([masking]) for masking in maskings]

    def _conditioned(self, site: Site, conditioned_on: Sequence[Site]) -> list[Masking]:
        """A masking of one site for each depth of the states that it is conditioned on."""
        states = [state for state in conditioned_on if _depth(state) >= _depth(site)]
        if not states:
            raise SettingError(
                f"no state of `given` comes at or after {site} (depth {_depth(site)}), so nothing can be known of "
                f"it. Add {site} itself, or sites further up."
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
