"""Rollout: attention weights multiplied over the layers."""

from __future__ import annotations

import torch

from maskhooks.explainers.attending import Attending, Queries
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import ROLLOUT
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import Clean
from maskhooks.settings.types import Fraction, Seed
from maskhooks.sites.site import Selector

_LEAST = 1e-30


class Rollout(Attending):
    """Scores each position of the first layer's input by its share of what attention reads up to a layer.

    R_l = A_l R_(l-1), A_l = rows of (1 - r) W_l + r I, each divided by its sum, where W_l are the mean weights over the
    heads of layer l, r is the residual's share and R_0 = I (Abnar & Zuidema 2020, "Quantifying Attention Flow in
    Transformers", with r = 0.5). The scores of a query are its row of R_l. Over the valid positions of an example they
    sum to 1; positions that are gated together share their sum. The depth is that of the layer's output.

    Rollout ignores what is read (values, MLPs), so it need not say what the prediction depends on.

    Args:
        hooked, sites, queries, seed: as `Attending` takes them.
        layer: the number of the last layer that counts, from 0, where -1 is the model's last; None gives scores up to
            every layer.
        residual: the share r of what a layer passes on unchanged.
    """

    name = "rollout"
    score_label = ROLLOUT

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        residual: Fraction = 0.5,
        queries: Queries = "mean",
        layer: int | None = -1,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, sites, queries=queries, layer=layer, seed=seed)
        self.residual = residual

    def scores(self, clean: Clean) -> list[Scores]:
        layers, found = self.weights(clean), []
        chosen, site = self.chosen(len(layers)), layers[0][0]
        places = clean.places[site]
        unchanged = torch.eye(places.valid.shape[1], device=places.valid.device)
        flow = unchanged.expand(len(places.valid), -1, -1)
        for number, (own, weights) in enumerate(layers[: chosen[-1] + 1]):
            mixed = (1 - self.residual) * weights.mean(1) + self.residual * unchanged
            flow = mixed / mixed.sum(-1, keepdim=True).clamp(min=_LEAST) @ flow
            if number in chosen:
                shares = self.read(flow, places)
                shares = shares / shares.sum(-1, keepdim=True).clamp(min=_LEAST)
                after = (own.depth or 0) + 1
                found.append(self.site_scores(clean, site, after, self.summed(shares, places)))
        return found
