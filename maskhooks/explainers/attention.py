"""Attention: the weight that each position gets."""

from __future__ import annotations

from typing import Literal

from maskhooks.explainers.attending import Attending, Queries
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import ATTENTION
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import Clean
from maskhooks.settings.types import Seed
from maskhooks.sites.site import Selector


class Attention(Attending):
    """Scores each position of a layer's input by the attention weight it gets, in [0, 1].

    s_j = sum over queries i of q_i max over heads h of W_hij (or the mean over heads), where the q_i are equal, or 1 at
    one query. The default, the largest head and the mean query, is the attention baseline of De Cao et al. (2020,
    table 1). Weights to positions that are gated together are summed, before heads are compared.

    Attention weights need not say what the prediction depends on (Jain & Wallace 2019, "Attention is not Explanation").

    Args:
        hooked, sites, queries, layer, seed: as `Attending` takes them.
        heads: whether a position gets the largest weight of all heads, or their mean.
    """

    name = "attention"
    score_label = ATTENTION

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        heads: Literal["max", "mean"] = "max",
        queries: Queries = "mean",
        layer: int | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, queries=queries, layer=layer, seed=seed)
        self.heads = heads

    def scores(self, clean: Clean) -> list[Scores]:
        layers, found = self.weights(clean), []
        for number in self.chosen(len(layers)):
            site, weights = layers[number]
            places = clean.places[site]
            summed = self.summed(weights, places)
            table = summed.amax(1) if self.heads == "max" else summed.mean(1)
            found.append(self.site_scores(clean, site, site.depth or 0, self.read(table, places)))
        return found
