"""Metrics against a known truth: which positions of each example the prediction needs, such as planted ones.

Only positions that count are compared: not padding, and by default no special tokens. An example may have several
minimal sets, each of which is enough; each metric then takes the set that suits the explanation best.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch

from maskhooks.errors import SettingError
from maskhooks.metrics import attribution, ranking
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.metrics.ranking import Bools
from maskhooks.settings.types import Count


class TruthMetric(Metric):
    """A metric that compares scores with a known truth.

    Args:
        absolute: as `Metric` takes it.
    """

    needs = frozenset({"truth"})
    range = (0.0, 1.0)
    unit = "share"

    def __call__(self, evidence: Evidence) -> Floats:
        examples = zip(evidence.scores(absolute=self.absolute), evidence.kept(), evidence.truths(), strict=True)
        found = [self._best([self.compared(scores, kept, row) for row in sets]) for scores, kept, sets in examples]
        return np.array(found, np.float64)

    @abstractmethod
    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        """Return the value of one example.

        Args:
            scores: the score of each position.
            kept: which positions are kept.
            truth: the weight of each, from 0.
        """

    def _best(self, values: list[float]) -> float:
        defined = [value for value in values if not math.isnan(value)]
        return (max if self.better == "higher" else min)(defined, default=math.nan)


class KeptMetric(TruthMetric):
    """A metric of the positions that are kept.

    Args:
        top: how many positions count as kept, those of the highest scores; equal scores count in expectation. None for
            those that the explanation keeps, with a score above its threshold: for masks, not for signed scores.
        absolute: as `Metric` takes it.
    """

    def __init__(self, *, top: Count | None = None, absolute: bool = False) -> None:
        super().__init__(absolute=absolute)
        self.top = top

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        chosen = kept.astype(np.float64) if self.top is None else ranking.in_top(scores, self.top)
        return self.rate(float(chosen[truth > 0].sum()), float(chosen.sum()), int((truth > 0).sum()))

    @abstractmethod
    def rate(self, hits: float, kept: float, true: int) -> float:
        """Return the value from the numbers of positions that are kept and true, kept, and true."""


class Precision(KeptMetric):
    """The share of kept positions that are true, in [0, 1]; higher is better. Not defined if none is kept.

    Args:
        top, absolute: as `KeptMetric` takes them.
    """

    name = "precision"
    better = "higher"
    source = "van Rijsbergen 1979"

    def rate(self, hits: float, kept: float, true: int) -> float:
        return hits / kept if kept else math.nan


class Recall(KeptMetric):
    """The share of true positions that are kept, in [0, 1]; higher is better. Not defined if none is true.

    Args:
        top, absolute: as `KeptMetric` takes them.
    """

    name = "recall"
    better = "higher"
    source = "van Rijsbergen 1979"

    def rate(self, hits: float, kept: float, true: int) -> float:
        return hits / true if true else math.nan


class F1(KeptMetric):
    """The harmonic mean of precision and recall, 2 hits / (kept + true), in [0, 1]; higher is better.

    Not defined if none is kept or true. Of each example, then averaged; not pooled over positions of all examples.

    Args:
        top, absolute: as `KeptMetric` takes them.
    """

    name = "f1"
    better = "higher"
    source = "van Rijsbergen 1979"

    def rate(self, hits: float, kept: float, true: int) -> float:
        return 2 * hits / (kept + true) if kept + true else math.nan


class Optimality(TruthMetric):
    """1 if the kept positions are one of the minimal sets, else 0; higher is better (De Cao et al. 2020, table 1).

    Args:
        absolute: has no effect: kept positions are compared.
    """

    name = "optimality"
    better = "higher"
    unit = "share of examples"
    source = "De Cao et al. 2020, table 1"

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        return float(np.array_equal(kept, truth > 0))


class AUROC(TruthMetric):
    """The area under the ROC curve of scores for true positions, in [0, 1]; higher is better, .5 is chance.

    P(s_i > s_j) + P(s_i = s_j) / 2 for a true position i and a false one j. Not defined if all are true, or none is.

    Args:
        absolute: as `Metric` takes it.
    """

    name = "auroc"
    better = "higher"
    unit = "probability"
    source = "Hanley & McNeil 1982"

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        return ranking.auroc(scores, truth > 0)


class AveragePrecision(TruthMetric):
    """Average precision (AUPRC) of scores for true positions, in [0, 1]; higher is better, chance is the share of true.

    sum_t (R_t - R_(t-1)) P_t over the distinct scores t as thresholds, without interpolation: not the area by
    trapezoids of ERASER, which is larger. Not defined if none is true.

    Args:
        absolute: as `Metric` takes it.
    """

    name = "average-precision"
    better = "higher"
    source = "Manning et al. 2008, section 8.4"

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        return ranking.average_precision(scores, truth > 0)


class PrecisionAtK(TruthMetric):
    """The share of true positions among the k highest scores, in [0, 1]; higher is better, chance is that of true.

    Equal scores count in expectation over their orders. Not defined if none is true.

    Args:
        k: the number of positions; None for as many as are true in the example (Bastings et al. 2022).
        absolute: as `Metric` takes it.
    """

    name = "precision-at-k"
    better = "higher"
    source = "Bastings et al. 2022"

    def __init__(self, *, k: Count | None = None, absolute: bool = False) -> None:
        super().__init__(absolute=absolute)
        self.k = k

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        true = int((truth > 0).sum())
        return ranking.precision_at(scores, truth > 0, self.k or true) if true else math.nan


class MeanRank(TruthMetric):
    """How many of the highest scores cover all true positions, from their number k up; lower is better.

    Equal scores count in expectation over their orders. Chance is k (n + 1) / (k + 1) for k of n positions. Not defined
    if none is true. The mean over examples is the mean rank of Bastings et al. 2022.

    Args:
        absolute: as `Metric` takes it.
    """

    name = "mean-rank"
    better = "lower"
    range = (1.0, math.inf)
    unit = "positions"
    source = "Bastings et al. 2022"

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        return ranking.covering_rank(scores, truth > 0)


class DistributionMetric(TruthMetric):
    """A metric of scores and truth as distributions over positions, each divided by its sum.

    Scores that are all 0 are uniform, as in `attribution.normalize`; a truth that is all 0 is not defined.

    Args:
        absolute: whether to take absolute values; scores below 0 have no distribution otherwise.
    """

    unit = "nats"

    def compared(self, scores: Floats, kept: Bools, truth: Floats) -> float:
        if (scores < 0).any():
            raise SettingError(
                f"the metric {self.name!r} needs scores from 0, but there are some below. Take their absolute values, "
                f"{{'name': {self.name!r}, 'absolute': True}}, or use a metric of ranks, such as 'auroc'"
            )
        if not truth.any():
            return math.nan
        one, two = (
            attribution.normalize(torch.from_numpy(row)[None], torch.ones(1, len(row), dtype=torch.bool))
            for row in (truth, scores)
        )
        return self.distance(one, two)

    @abstractmethod
    def distance(self, truth: torch.Tensor, scores: torch.Tensor) -> float:
        """Return the distance of two distributions, `(1, position)`."""


class KL(DistributionMetric):
    """The divergence KL(truth || scores), in nats, from 0; lower is better (De Cao et al. 2020, table 1).

    Infinite if a true position has a score of 0, and so is the mean over examples then: `js` is finite.

    Args:
        absolute: as `DistributionMetric` takes it.
    """

    name = "kl"
    better = "lower"
    range = (0.0, math.inf)
    source = "De Cao et al. 2020, table 1"

    def distance(self, truth: torch.Tensor, scores: torch.Tensor) -> float:
        return max(0.0, attribution.kl(truth, scores).item())


class JS(DistributionMetric):
    """The Jensen-Shannon divergence of truth and scores, in nats, from 0 to ln 2; lower is better (Lin 1991).

    Args:
        absolute: as `DistributionMetric` takes it.
    """

    name = "js"
    better = "lower"
    range = (0.0, math.log(2))
    source = "De Cao et al. 2020, table 1; Lin 1991"

    def distance(self, truth: torch.Tensor, scores: torch.Tensor) -> float:
        return min(max(0.0, attribution.js(truth, scores).item()), math.log(2))
