"""Metrics by erasure: how the model's output changes when positions are removed in order of their scores.

Positions are removed at the explanation's own site. j is the class that the model predicts for the unchanged example,
and f_j the model's probability of it, averaged over heads and predicted positions. An example has n positions that
count: padding and special tokens do not, and are never removed; positions gated together are one. A share b of them is
ceil(b n), as in ERASER's code; equal scores are in an order drawn from the seed.

Values depend on how positions are removed, the operator, and are not comparable across operators or across models. Do
not judge an explainer only with the baseline that it was trained with.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MinLen
from jaxtyping import Float
from torch import Tensor

from maskhooks.masks.baselines import BASELINES, BaselineSetting
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.metrics.removal import Operator, Removal, Removing, removals
from maskhooks.model.outputs import (
    DIVERGENCES,
    DivergenceSetting,
    Outputs,
    predicted_probability,
    prediction_loss,
)
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import schema_of
from maskhooks.settings.types import Count, Natural, Seed

#: A share of positions, above 0.
Share = Annotated[float, Gt(0), Le(1)]
_ERASER = "DeYoung et al. 2020, section 4, as its code computes it"


class ErasureMetric(Metric):
    """A metric that removes positions in order of their scores, and looks at the output.

    Args:
        absolute: as `Metric` takes it.
        operator: how a position is removed: "baseline", its value becomes the baseline; "mask", at the output of an
            embedding, its value becomes that of the mask token; "delete", at the input of a text model whose task
            knows how, tokens are left out, and the others move together.
        baseline: what the operator "baseline" puts there. "mean" is the mean of the batches that are judged; a trained
            vector is given as a `Baseline`.
        token: the id of the mask token; None for the one that the model's task knows.
        seed: the random seed, for the order of equal scores.
    """

    needs = frozenset({"hooked"})
    range = (-1.0, 1.0)
    unit = "probability"

    def __init__(
        self,
        *,
        absolute: bool = False,
        operator: Operator = "baseline",
        baseline: BaselineSetting = "zero",
        token: Natural | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute)
        registry.check(BASELINES, baseline)
        self.operator, self.baseline, self.token, self.seed = operator, baseline, token, seed

    def __call__(self, evidence: Evidence) -> Floats:
        found = np.full(len(evidence.examples), np.nan)
        for removal in removals(evidence, self.removing):
            here = np.isin(removal.examples, evidence.examples)
            found[np.searchsorted(evidence.examples, removal.examples[here])] = self.measured(removal).numpy()[here]
        return found

    @property
    def removing(self) -> Removing:
        """How positions are removed."""
        return Removing(self.operator, self.baseline, self.token, self.absolute, self.seed)

    @abstractmethod
    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        """Return the value of each example of a batch, in float64."""


class BinnedMetric(ErasureMetric):
    """A metric that is a mean over some shares of positions.

    Args:
        bins: the shares of positions, each rounded up to a whole number of them.
        absolute, operator, baseline, token, seed: as `ErasureMetric` takes them.
    """

    def __init__(
        self,
        *,
        bins: Annotated[Sequence[Share], MinLen(1)] = (0.01, 0.05, 0.1, 0.2, 0.5),
        absolute: bool = False,
        operator: Operator = "baseline",
        baseline: BaselineSetting = "zero",
        token: Natural | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute, operator=operator, baseline=baseline, token=token, seed=seed)
        self.bins = tuple(bins)


class Comprehensiveness(BinnedMetric):
    """The mean over bins b of f_j(x) - f_j(x without the highest-scored share b), in [-1, 1]; higher is better.

    The plain mean over bins of ERASER's code (DeYoung et al. 2020, section 4); the paper divides by one more, for an
    empty bin, so that its values are 5/6 of these with five bins.

    Args:
        bins, absolute, operator, baseline, token, seed: as `BinnedMetric` takes them.
    """

    name = "comprehensiveness"
    better = "higher"
    source = _ERASER

    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        return removal.without_highest(self.bins, _drop).mean(0)


class Sufficiency(BinnedMetric):
    """The mean over bins b of f_j(x) - f_j(x with only the highest-scored share b), in [-1, 1]; lower is better.

    It is below 0 where the class is more probable with only these positions. The plain mean over bins of ERASER's code
    (DeYoung et al. 2020, section 4), without the empty bin of the paper. Positions that do not count are kept.

    Args:
        bins, absolute, operator, baseline, token, seed: as `BinnedMetric` takes them.
    """

    name = "sufficiency"
    better = "lower"
    source = _ERASER

    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        return removal.only_highest(self.bins, _drop).mean(0)


@dataclass(frozen=True, eq=False)
class Curves:
    """Perturbation curves of examples, each `[example, step]`; NaN where one was not computed.

    Attributes:
        shares: the share of positions removed after each step.
        highest_first: f_j, the highest scores removed first (MoRF).
        lowest_first: f_j, the lowest scores removed first (LeRF).
    """

    shares: Floats
    highest_first: Floats
    lowest_first: Floats

    @classmethod
    def empty(cls, examples: int, steps: int) -> Curves:
        """Return curves of NaN."""
        return cls(*np.full((3, examples, steps + 1), np.nan))


class Lines:
    """f_j of a batch as 0, 1/L, ..., 1 of the positions are removed; a curve is computed when it is first asked for.

    Args:
        removal: the batch.
        steps: the number L of steps; each share is rounded up to a whole number of positions.
    """

    def __init__(self, removal: Removal, steps: int) -> None:
        self._removal, self._shares = removal, [step / steps for step in range(steps + 1)]

    @functools.cached_property
    def shares(self) -> Float[Tensor, "step example"]:
        """The share that is removed after each step, after rounding up."""
        return torch.from_numpy(self._removal.shares(self._shares))

    @functools.cached_property
    def highest_first(self) -> Float[Tensor, "step example"]:
        """f_j after each step, the highest scores removed first (MoRF)."""
        return self._removal.without_highest(self._shares, predicted_probability)

    @functools.cached_property
    def lowest_first(self) -> Float[Tensor, "step example"]:
        """f_j after each step, the lowest scores removed first (LeRF)."""
        return self._removal.without_lowest(self._shares, predicted_probability)

    def area(self, curve: Float[Tensor, "step example"]) -> Float[Tensor, " example"]:
        """Return the trapezoid area under a curve over the share that is removed."""
        return torch.trapezoid(curve, self.shares, dim=0)


class CurveMetric(ErasureMetric):
    """A metric of perturbation curves: f_j as 0, 1/L, ..., 1 of the positions are removed.

    Args:
        steps: the number L of steps; each share is rounded up to a whole number of positions.
        absolute, operator, baseline, token, seed: as `ErasureMetric` takes them.
    """

    def __init__(
        self,
        *,
        steps: Count = 10,
        absolute: bool = False,
        operator: Operator = "baseline",
        baseline: BaselineSetting = "zero",
        token: Natural | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute, operator=operator, baseline=baseline, token=token, seed=seed)
        self.steps = steps

    def __call__(self, evidence: Evidence) -> Floats:
        return self.traced(evidence)[0]

    def traced(self, evidence: Evidence) -> tuple[Floats, Curves]:
        """Return the value of each example, and the curves that were computed for it."""
        values, found = np.full(len(evidence.examples), np.nan), Curves.empty(len(evidence.examples), self.steps)
        for removal in removals(evidence, self.removing):
            here = np.isin(removal.examples, evidence.examples)
            at = np.searchsorted(evidence.examples, removal.examples[here])
            lines = Lines(removal, self.steps)
            values[at] = self.of(lines).numpy()[here]
            for name in vars(found).keys() & vars(lines).keys():
                vars(found)[name][at] = np.asarray(vars(lines)[name]).T[here]
        return values, found

    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        return self.of(Lines(removal, self.steps))

    @abstractmethod
    def of(self, lines: Lines) -> Float[Tensor, " example"]:
        """Return the value of each example of a batch, in float64."""


class AOPC(CurveMetric):
    """The area over the perturbation curve: the mean over steps k = 0..L of f_j(x) - f_j(x_k), in [-1, 1].

    x_k is the example after step k, the highest scores removed first; x_0 is unchanged. Higher is better. It is the
    formula of Samek et al. 2017, on probabilities and divided by the L + 1 points; with L = n it removes one position
    in each step.

    Args:
        steps, absolute, operator, baseline, token, seed: as `CurveMetric` takes them.
    """

    name = "aopc"
    better = "higher"
    source = "Samek et al. 2017, on probabilities"

    def of(self, lines: Lines) -> Float[Tensor, " example"]:
        return (lines.highest_first[0] - lines.highest_first).mean(0)


class MoRF(CurveMetric):
    """The area under f_j over the share of positions removed, the highest scores first; lower is better.

    The integral over the share in [0, 1] by trapezoids, in [0, 1]. A good explanation makes the class improbable early.

    Args:
        steps, absolute, operator, baseline, token, seed: as `CurveMetric` takes them.
    """

    name = "morf"
    better = "lower"
    range = (0.0, 1.0)
    source = "Samek et al. 2017, as an area"

    def of(self, lines: Lines) -> Float[Tensor, " example"]:
        return lines.area(lines.highest_first)


class LeRF(CurveMetric):
    """The area under f_j over the share of positions removed, the lowest scores first; higher is better.

    The integral over the share in [0, 1] by trapezoids, in [0, 1]. A good explanation keeps the class probable long.

    Args:
        steps, absolute, operator, baseline, token, seed: as `CurveMetric` takes them.
    """

    name = "lerf"
    better = "higher"
    range = (0.0, 1.0)
    source = "Samek et al. 2017, as an area"

    def of(self, lines: Lines) -> Float[Tensor, " example"]:
        return lines.area(lines.lowest_first)


class AreaBetween(CurveMetric):
    """The area between the two curves, LeRF - MoRF, over the share of positions removed, in [-1, 1]; higher is better.

    0 on average for a random order. Schulz et al. 2020 call it degradation; they also scale each curve by its ends,
    and this does not.

    Args:
        steps, absolute, operator, baseline, token, seed: as `CurveMetric` takes them.
    """

    name = "area-between"
    better = "higher"
    source = "Schulz et al. 2020, not scaled"

    def of(self, lines: Lines) -> Float[Tensor, " example"]:
        return lines.area(lines.lowest_first - lines.highest_first)


class LogOdds(ErasureMetric):
    """The log ratio log f_j(x without the highest-scored share) - log f_j(x), in nats; lower is better.

    Not odds, in spite of its name, and without a lower bound. The share is rounded up; published code rounds it down,
    to nothing for short texts. From log-probabilities, so that it is finite. Heads are summed, positions averaged.

    Args:
        removed: the share of positions that is removed.
        absolute, operator, baseline, token, seed: as `ErasureMetric` takes them.
    """

    name = "log-odds"
    better = "lower"
    range = (-np.inf, np.inf)
    unit = "nats"
    source = "Shrikumar et al. 2017, in the form used for text"

    def __init__(
        self,
        *,
        removed: Share = 0.2,
        absolute: bool = False,
        operator: Operator = "baseline",
        baseline: BaselineSetting = "zero",
        token: Natural | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute, operator=operator, baseline=baseline, token=token, seed=seed)
        self.removed = removed

    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        return removal.without_highest([self.removed], _log_ratio)[0]


class DivergenceKept(ErasureMetric):
    """The divergence D(f(x) || f(x with only the highest-scored share)), in nats, from 0; lower is better.

    The whole output counts, not one class. At equal shares it compares explainers by what masks are trained for.

    Args:
        kept: the share of positions that stays, rounded up to a whole number of them.
        divergence: the distance D between the original outputs and those of what is kept.
        absolute, operator, baseline, token, seed: as `ErasureMetric` takes them.
    """

    name = "divergence"
    better = "lower"
    range = (0.0, np.inf)
    unit = "nats"
    source = "De Cao et al. 2020, the constraint on the output"

    def __init__(
        self,
        *,
        kept: Annotated[float, Ge(0), Le(1)] = 0.2,
        divergence: DivergenceSetting = "kl",
        absolute: bool = False,
        operator: Operator = "baseline",
        baseline: BaselineSetting = "zero",
        token: Natural | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(absolute=absolute, operator=operator, baseline=baseline, token=token, seed=seed)
        self.kept, self.divergence = kept, divergence

    def measured(self, removal: Removal) -> Float[Tensor, " example"]:
        return removal.only_highest([self.kept], registry.make(DIVERGENCES, self.divergence))[0]


def curves(evidence: Evidence, metric: CurveMetric) -> Curves:
    """Return both perturbation curves of all examples, at the steps of a metric, to draw them."""
    how = {name: getattr(metric, name) for name in schema_of(CurveMetric)}
    return AreaBetween(**how).traced(evidence)[1]


def _drop(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return f_j(x) - f_j(masked)."""
    return predicted_probability(original, original) - predicted_probability(original, masked)


def _log_ratio(original: Outputs, masked: Outputs) -> Float[Tensor, " batch"]:
    """Return log f_j(masked) - log f_j(x)."""
    return prediction_loss(original, original) - prediction_loss(original, masked)
