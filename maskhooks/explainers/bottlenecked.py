"""The base class of explainers that limit a site's information with noise: IBA, Schulz, Readout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.errors import NotFittedError, SettingError
from maskhooks.explainers.learned import Learned
from maskhooks.explanations.explanation import Scores
from maskhooks.explanations.score_labels import BITS
from maskhooks.masks.baselines import Noise
from maskhooks.masks.bottleneck import Bottleneck, Soft
from maskhooks.masks.masking import Masking
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import ClassLoss, DivergenceSetting, count
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.seeds import generator
from maskhooks.sites.site import Selector, Site
from maskhooks.training.objectives import Objective
from maskhooks.training.problem import Problem
from maskhooks.training.recipe import RecipeSetting
from maskhooks.training.unconstrained import InformationBottleneck

_TEXT, _OTHER = 1e-5, 10.0  # beta as published for BERT (Jiang et al. 2020) and for images (Schulz et al. 2020)


class Bottlenecked(Learned):
    """An explainer that mixes a site's values with noise, and learns how little of them the prediction needs.

    min E[-log p(class | z h + (1 - z) e)] + beta mean KL(N(z r, (1 - z)^2) || N(0, 1)), e ~ N(mean, deviation^2), with
    r = (h - mean) / deviation and z = sigmoid(logits) (Schulz et al. 2020, eq. 4 to 9). Scores are the capacity of a
    position, the KL summed over its features, in bits: an upper bound of what the layers above get to know about it.

    Args:
        hooked: the wrapped model.
        sites: where information is limited, each site by itself: a tag, an address, a glob, a Site, or several.
        beta: the price of information, in nats of loss per nat of capacity, the mean over a site's gates: a site with k
            gates pays beta / k for each nat. Default: 1e-5 for models of text, as Jiang et al. use, and 10 for others,
            as Schulz et al. use.
        divergence: the loss; by default -log p of the predicted class.
        target: a class, whose -log p is the loss instead; None for the predicted one.
        statistics: "data" takes the noise's mean and deviation of each feature over the data of `fit`; "one-item"
            takes the example's own values one layer below, with a deviation of .003, as the published code for BERT
            does. With it, there is nothing to fit.
        amortized: whether `fit` trains a probe for any batch.
        recipe: the steps, learning rates and number of noise samples.
        seed: the random seed.

    Raises:
        SettingError, UnknownNameError, UnknownSiteError, PatternError: as with `Learned`; and if "one-item" finds no
            site below.
    """

    score_label = BITS

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector,
        beta: float | None,
        divergence: DivergenceSetting,
        target: int | None,
        statistics: str,
        amortized: bool,
        recipe: RecipeSetting,
        seed: int,
    ) -> None:
        if statistics not in ("data", "one-item"):
            raise SettingError(f"statistics={statistics!r} is not known. Give 'data' or 'one-item'")
        super().__init__(hooked, sites, None, Soft(), "noise", divergence, amortized, recipe, seed)
        self.beta, self.target, self.statistics = beta, target, statistics

    def _problem(self) -> Problem:
        problem = super()._problem()
        if self.target is not None:
            problem.divergence = ClassLoss(self.target)
        return problem

    def _make_objective(self) -> Objective:
        beta = self.beta
        if beta is None:
            beta = _TEXT if self.hooked.task.recipe == "language" else _OTHER
        return InformationBottleneck(beta)

    def _bottleneck(self, site: Site, vote: Vote, *, per_feature: bool, smoothing: float = 0.0) -> Masking:
        previous = None if self.statistics == "data" else self._below(site)
        return Bottleneck(
            site, site.depth or 0, [vote], Noise(), per_feature=per_feature, smoothing=smoothing, previous=previous
        )

    def _below(self, site: Site) -> Site:
        """Return the hidden state one layer below."""
        lower = [one for one in self.hooked.same_positions([site]) if (one.depth or 0) < (site.depth or 0)]
        if not lower:
            raise SettingError(
                f"statistics='one-item' takes the values one layer below {site}, but no hidden state with the same "
                "positions comes before it. Give statistics='data', or a higher site"
            )
        return max(lower, key=lambda one: one.depth or 0)

    def check_ready(self) -> None:
        if not self.fitted and (self.amortized or self.statistics == "data"):
            raise NotFittedError(
                f"this {type(self).__name__} knows no statistics of the values that its noise replaces yet: call "
                "fit(loader) first, load a saved one, or give statistics='one-item', which needs none"
            )

    def _check_data(self, train: Iterable[Any]) -> None:
        first, *more = itertools.islice(train, 2)
        if more or self.statistics != "data":
            return
        clean = clean_pass(self.hooked, move(first, device_of(self.hooked.model)), self.sites)
        if count(clean.outputs) == 1:
            raise SettingError(
                "noise statistics of a single example say nothing about the data. Give fit more examples, or "
                "statistics='one-item', which takes the example's own values one layer below"
            )

    def scores(self, clean: Clean) -> list[Scores]:
        self.optimise(clean)
        return [
            self.site_scores(clean, masking.site, masking.depth, self._score(clean, masking))
            for masking in self.maskings
        ]

    @torch.no_grad()
    def _score(self, clean: Clean, masking: Masking) -> Float[Tensor, "*gated"]:
        """Return the capacity of each position, in bits."""
        masked = masking.sample(clean.values, clean.places[masking.site], generator(self.seed))
        assert masked.nats is not None
        own = masking.site.gating()
        sizes = own.shape(masked.original)
        features = math.prod(sizes[axis] for axis in sizes if axis not in own.gated)
        means: Tensor = einops.reduce(
            masked.nats, f"{' '.join(masking.pattern.gated)} -> {' '.join(own.gated)}", "mean"
        )
        return means * features / math.log(2)
