"""Metrics of agreement between explanations of the same examples, such as of other explainers or with other seeds.

Agreement is not quality: explanations may agree and be wrong. Scores of randomised weights should not agree with those
of the model. Only positions that count are compared: not padding, and by default no special tokens. With several other
explanations the value of an example is the mean over them, and is not defined if one of its parts is not.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import numpy as np

from maskhooks.metrics import ranking
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.settings.types import Count


class AgreementMetric(Metric):
    """A metric that compares scores with those of other explanations, one by one.

    Args:
        absolute: as `Metric` takes it.
    """

    needs = frozenset({"others"})
    better: Literal["higher", "lower"] = "higher"
    range = (-1.0, 1.0)
    unit = "correlation"

    def __call__(self, evidence: Evidence) -> Floats:
        mine = evidence.scores(absolute=self.absolute)
        others = evidence.other_scores(absolute=self.absolute)
        pairs = [[self.compared(*pair) for pair in zip(mine, other, strict=True)] for other in others]
        found: Floats = np.array(pairs, np.float64).mean(0)
        return found

    @abstractmethod
    def compared(self, first: Floats, other: Floats) -> float:
        """Return the value of one example, from its scores in the two explanations."""


class Kendall(AgreementMetric):
    """Kendall's tau-b of two explanations' scores of an example, in [-1, 1]; higher is more agreement.

    (C - D) / sqrt((C + D + T_1) (C + D + T_2)) with C and D the pairs of positions in the same and in the opposite
    order, T_1 and T_2 those equal in one alone. Not defined if all scores of one explanation are equal. Kept and not
    kept, as scores, cannot reach 1 against scores without ties.

    Args:
        absolute: as `Metric` takes it.
    """

    name = "kendall"
    source = "Kendall 1945"

    def compared(self, first: Floats, other: Floats) -> float:
        return ranking.kendall(first, other)


class Spearman(AgreementMetric):
    """Spearman's rank correlation of two explanations' scores of an example, in [-1, 1]; higher is more agreement.

    The correlation of ranks, where equal scores share the mean of theirs. Not defined if all scores of one explanation
    are equal.

    Args:
        absolute: as `Metric` takes it.
    """

    name = "spearman"
    source = "Spearman 1904"

    def compared(self, first: Floats, other: Floats) -> float:
        return ranking.spearman(first, other)


class TopKOverlap(AgreementMetric):
    """The share of the k highest scores that two explanations have in common, in [0, 1]; higher is more agreement.

    Equal scores count in expectation over their orders, which are independent, so that constant scores give chance, k/n
    for n positions. Not defined for examples of no more than k positions.

    Args:
        k: the number of positions.
        absolute: as `Metric` takes it.
    """

    name = "top-k-overlap"
    range = (0.0, 1.0)
    unit = "share"
    source = "Krishna et al. 2022, feature agreement"

    def __init__(self, *, k: Count = 2, absolute: bool = False) -> None:
        super().__init__(absolute=absolute)
        self.k = k

    def compared(self, first: Floats, other: Floats) -> float:
        return ranking.overlap(first, other, self.k)


class Deviation(Metric):
    """The standard deviation of scores over explanations, averaged over an example's positions; lower is better.

    The explanations are this one and the others, S in all, such as of several seeds; the divisor is S - 1. In units of
    the score. `analyses.seed_deviation` averages over the positions of all examples, padding apart; this is a number
    for each example.

    Args:
        absolute: as `Metric` takes it.
    """

    name = "seed-deviation"
    better = "lower"
    range = (0.0, math.inf)
    unit = "score"
    source = "De Cao et al. 2020, section 3.2"
    needs = frozenset({"others"})

    def __call__(self, evidence: Evidence) -> Floats:
        each = [evidence.scores(absolute=self.absolute), *evidence.other_scores(absolute=self.absolute)]
        return np.array([np.stack(scores).std(0, ddof=1).mean() for scores in zip(*each, strict=True)])
