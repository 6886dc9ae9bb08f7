"""Masking groups: the maskings that one masked pass applies, at one or several sites."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from torch import Generator, nn

from maskhooks.errors import PatternError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.tap import Values
from maskhooks.masks.masking import Masking
from maskhooks.masks.samples import Masked
from maskhooks.sites.places import Places, PlacesBySite
from maskhooks.sites.site import Site


class MaskingGroup:
    """Maskings applied in one pass. Each reads the clean values; one divergence judges them together.

    Args:
        maskings: in order of computation; often just one.
        tied: whether all sites share the gates of the first one, so that an edge has one gate in all layers. The
            votes of the other maskings are then unused.

    Attributes:
        depth: the depth of the last masking, which the rows of an explanation carry.
    """

    def __init__(self, maskings: Sequence[Masking], *, tied: bool = False) -> None:
        self.maskings = list(maskings)
        self.tied = tied
        self.depth = self.maskings[-1].depth

    def __str__(self) -> str:
        return str(self.maskings[0]) if len(self.maskings) == 1 else self.label

    @property
    def label(self) -> str:
        """The masked sites, as shown in logs."""
        return ", ".join(str(site) for site in self.sites)

    @functools.cached_property
    def sites(self) -> list[Site]:
        """The masked sites, in order of computation."""
        return [masking.site for masking in self.maskings]

    @functools.cached_property
    def reads(self) -> list[Site]:
        """The masked sites and all sites whose values the votes need."""
        return list(dict.fromkeys(site for masking in self.maskings for site in masking.reads))

    @property
    def modules(self) -> list[nn.Module]:
        """The trained modules: probes and baselines, each once."""
        return modules_of(self.maskings)

    def sample(
        self,
        values: Values,
        places: PlacesBySite,
        generator: Generator | None = None,
        *,
        rounded: float | None = None,
    ) -> list[Masked]:
        """Mask a batch at each site; see `Masking.sample`."""
        if not self.tied:
            return [one.sample(values, places[one.site], generator, rounded=rounded) for one in self.maskings]
        first, *others = self.maskings
        masked = first.sample(values, places[first.site], generator, rounded=rounded)
        return [masked, *(self._tied(other, masked, values, places[other.site], generator) for other in others)]

    def replacements(self, masked: Sequence[Masked]) -> dict[Site, Replacement]:
        """Return the replacement at each site for what `sample` returned."""
        return {masking.site: masking.replacement(one) for masking, one in zip(self.maskings, masked, strict=True)}

    def of(self, maskings: Sequence[Masking]) -> MaskingGroup:
        """Return the same group of other maskings, such as copies of its own that draw for several processes."""
        return MaskingGroup(maskings, tied=self.tied)

    def shift_logits(self, by: float) -> None:
        """Add a number to the logits of every probe; see `Probe.shift_logits`."""
        for probe in {id(vote.probe): vote.probe for one in self.maskings for vote in one.votes}.values():
            probe.shift_logits(by)

    def sharpen(self, factor: float) -> None:
        """Make every gate more decided: multiply its logit's distance from an open probability of one half."""
        for probe, middle in {vote.probe: one.gate.middle for one in self.maskings for vote in one.votes}.items():
            probe.sharpen(factor, middle)

    def last_depths(self, progress: float) -> MaskingGroup:
        """Return the maskings of the last depths, one more per stage, so that masks are learned from the top down.

        Args:
            progress: the fraction of the stages completed.
        """
        depths = sorted({masking.depth for masking in self.maskings})
        count = len(depths) if self.tied else min(len(depths), 1 + int(len(depths) * progress))
        return MaskingGroup([one for one in self.maskings if one.depth >= depths[-count]], tied=self.tied)

    def _tied(
        self, masking: Masking, first: Masked, values: Values, places: Places, generator: Generator | None
    ) -> Masked:
        value = values[masking.site]
        shape = masking.pattern.mask_shape(value, site=masking.site)
        if shape != tuple(first.sample.shape):
            raise PatternError(
                f"gates of shape {list(shape)} at site {masking.site} cannot be tied to gates of shape "
                f"{list(first.sample.shape)} at {self.maskings[0].site}. Use separate gates for each site: tied=False",
                site=masking.site,
            )
        return masking.mask(value, places, first.sample, first.log_open, generator)


def modules_of(maskings: Iterable[Masking]) -> list[nn.Module]:
    """Return the probes and baselines of maskings, each once."""
    return list({id(module): module for masking in maskings for module in masking.modules}.values())


def by_shared_modules(groups: Sequence[MaskingGroup]) -> list[list[MaskingGroup]]:
    """Return lists of groups that share modules, such as votes."""
    found: list[list[MaskingGroup]] = []
    for group in groups:
        mine = {id(module) for module in group.modules}
        joined = [one for one in found if any(id(module) in mine for other in one for module in other.modules)]
        found = [one for one in found if one not in joined]
        found.append([*(other for one in joined for other in one), group])
    return found


def reads_of(groups: Iterable[MaskingGroup]) -> list[Site]:
    """Return the sites that masked passes of these groups read, each once."""
    return _each_once([group.reads for group in groups])


def sites_of(groups: Iterable[MaskingGroup]) -> list[Site]:
    """Return the sites that these groups mask, each once."""
    return _each_once([group.sites for group in groups])


def _each_once(lists: Sequence[list[Site]]) -> list[Site]:
    return list(lists[0]) if len(lists) == 1 else list(dict.fromkeys(site for sites in lists for site in sites))
