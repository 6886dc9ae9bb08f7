"""Random scores, which any other explainer must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import RANDOM
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import Clean
from maskhooks.seeds import generator
from maskhooks.settings.types import Seed
from maskhooks.sites.site import Selector, Site


class Random(Explainer):
    """Scores drawn from U(0, 1), the same for the same seed and shape; positions gated together share one.

    Args:
        hooked: the wrapped model.
        sites: what to score: a tag, an address, a glob, a Site, or several of these.
        seed: the random seed.
    """

    name = "random"
    score_label = RANDOM

    def __init__(self, hooked: Hooked, sites: Selector = "hidden", *, seed: Seed = 0) -> None:
        super().__init__(hooked, seed=seed)
        self.sites = hooked.find(sites)

    @property
    def reads(self) -> Sequence[Site]:
        return self.sites

    def scores(self, clean: Clean) -> list[Scores]:
        found = []
        for number, site in enumerate(self.sites):
            shape = site.gating().mask_shape(clean.values[site], site=site)
            values = torch.rand(shape, generator=generator(self.seed, number))
            units = clean.places[site].units
            values = values if units is None else units.shared(values, site.gating())
            found.append(self.site_scores(clean, site, site.depth or 0, values))
        return found
