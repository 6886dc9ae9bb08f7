"""Infidelity: how far scores are from what the output loses when positions are removed together."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from annotated_types import Gt, Lt
from jaxtyping import Bool, Float
from torch import Tensor

from maskhooks.masks.baselines import BASELINES, BaselineSetting
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.metrics.removal import Removal, Removing, removals
from maskhooks.plugins.registry import registry
from maskhooks.seeds import seeded
from maskhooks.settings.types import Count, Natural, Seed
from maskhooks_captum.explained import Explained, Output
from maskhooks_captum.explainer import library

_SETS = 330  # the purpose of random numbers


class Infidelity(Metric):
    """The expected squared difference of what scores say and what the output loses, by Captum; lower is better.

    E (sum of the scores of the removed positions - (f(x) - f(x without them)))^2 over random sets of positions (Yeh et
    al. 2019), by `captum.metrics.infidelity` with perturbations that count 1 where a position is removed. Positions are
    removed at the explanation's own site, where their value becomes the baseline; padding and what else does not count
    stays. So a score must mean what the output loses with its position, as the contribution by integrated gradients
    does and a plain gradient does not; or, normalised, be in proportion to it, as P(kept) may be.

    The value is divided by that of scores that are all 0, E (f(x) - f(x without them))^2. Normalised it is in [0, 1], 0
    if the loss is a multiple of the sum of scores. Captum's normalised infidelity is as low for scores of the
    opposite sign; here these are as good as scores of 0. Not defined for an example whose output does not move.

    Args:
        samples: the number of random sets for each example.
        share: the probability that a position is removed, independent of the others.
        normalize: whether scores are multiplied by the number that fits best, for each example; otherwise they must
            be in units of the output.
        relative: whether the value is divided by that of scores that are all 0; otherwise it is in squared units of
            the output.
        baseline: what a removed position has, as `ErasureMetric` takes it.
        target: the class whose output counts; None for the one that the model predicts.
        output: what of that class, as the explainers of Captum take it: its logit, log-probability or probability.
        seed: the random seed.

    Raises:
        MissingExtraError: captum is not installed.
    """

    name = "infidelity"
    better = "lower"
    range = (0.0, math.inf)
    unit = "ratio to scores of 0"
    source = "Yeh et al. 2019; captum.metrics.infidelity"
    needs = frozenset({"hooked"})

    def __init__(
        self,
        *,
        samples: Count = 100,
        share: Annotated[float, Gt(0), Lt(1)] = 0.5,
        normalize: bool = True,
        relative: bool = True,
        baseline: BaselineSetting = "zero",
        target: Natural | None = None,
        output: Output | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        library(self.name)
        registry.check(BASELINES, baseline)
        self.samples, self.share, self.normalize, self.relative = samples, share, normalize, relative
        self.baseline, self.target, self.output, self.seed = baseline, target, output, seed
        self.unit = self.unit if relative else "squared output"

    @torch.no_grad()
    def __call__(self, evidence: Evidence) -> Floats:
        found = np.full(len(evidence.examples), np.nan)
        for removal in removals(evidence, Removing(baseline=self.baseline, seed=self.seed)):
            here = np.isin(removal.examples, evidence.examples)
            at = np.searchsorted(evidence.examples, removal.examples[here])
            found[at] = self._measured(removal).cpu().numpy()[here]
        return found

    def _measured(self, removal: Removal) -> Float[Tensor, " example"]:
        from captum.metrics import infidelity

        sets = _Sets(removal, Explained(removal.clean, self.target, self.output))
        draws = [
            np.random.default_rng(seeded(self.seed, _SETS, int(number))).random((self.samples, len(places)))
            for number, places in zip(removal.examples, sets.places, strict=True)
        ]
        removed = _padded([torch.from_numpy(draw < self.share) for draw in draws]).flatten(0, 1)

        def perturb(rows: Float[Tensor, "row place"]) -> tuple[Tensor, Tensor]:
            return removed.double(), rows - removed.double()

        def of(scores: Float[Tensor, "example place"], *, normalize: bool) -> Float[Tensor, " example"]:
            everything = torch.ones_like(scores)
            value: Tensor = infidelity(
                sets, perturb, everything, scores, n_perturb_samples=self.samples, normalize=normalize
            )
            return value.clamp(min=0)  # Captum's are below 0 by rounding

        scores = _padded([torch.from_numpy(removal.gates[places])[None] for places in sets.places])[:, 0]
        nothing = of(torch.zeros_like(scores), normalize=False)
        value = of(scores, normalize=self.normalize)
        if self.normalize:  # the difference is in proportion to the covariance of what scores say and what is lost
            opposed = of(-scores, normalize=False) < of(scores, normalize=False)
            value = torch.where(opposed, nothing, torch.minimum(value, nothing))
        return torch.where(nothing > 0, value / nothing, math.nan) if self.relative else value


class _Sets:
    """The explained number of each example of a batch, as a function of which of its positions are there.

    Args:
        removal: the batch.
        explained: what is explained.

    Attributes:
        places: the gates of each example that count.
    """

    def __init__(self, removal: Removal, explained: Explained) -> None:
        self._removal, self._explained = removal, explained
        counts = ~np.isnan(removal.gates)
        self.places = [np.flatnonzero(counts & (removal.owners == own)) for own in range(len(removal.examples))]
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, rows: Float[Tensor, "row place"]) -> Float[Tensor, " row"]:
        """Return the number of each row; the rows of an example follow each other."""
        there = rows.bool().view(len(self.places), -1, rows.shape[1]).numpy()
        return torch.stack([self._number(there[:, sample]) for sample in range(there.shape[1])], 1).flatten()

    def _number(self, there: Bool[np.ndarray, "example place"]) -> Float[Tensor, " example"]:
        """Return the number of each example with some of its places; each set is run once."""
        key = there.tobytes()
        if key not in self._known:
            clean, is_open = self._removal.clean, np.ones(len(self._removal.gates), bool)
            for places, row in zip(self.places, there, strict=True):
                is_open[places] = row[: len(places)]
            hooked, site = clean.hooked, self._removal.masking.site
            with hooked.tap(replace={site: self._removal.replacement(is_open)}):
                result = hooked(clean.batch)
            found = self._explained(result, clean.batch, torch.arange(len(self.places)))
            self._known[key] = found.double().cpu()
        return self._known[key]


def _padded(rows: list[Tensor]) -> Tensor:
    """Stack tensors `(sample, place)` of different numbers of places; what is added is 0."""
    most = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, most - row.shape[1])) for row in rows])
