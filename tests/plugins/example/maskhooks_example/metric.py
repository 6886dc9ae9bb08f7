"""A metric that needs nothing but scores."""

from __future__ import annotations

import numpy as np

from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric


class Gini(Metric):
    """The Gini index of absolute scores s_1 <= ... <= s_n: 1 - 2 sum_k s_k / sum(s) (n - k + 1/2) / n.

    0 if all are equal, 1 - 1/n if one has everything; not defined if all are 0 (Hurley & Rickard 2009).
    """

    name = "gini"
    better = "higher"
    range = (0.0, 1.0)
    unit = ""
    source = "Hurley & Rickard 2009"

    def __init__(self) -> None:
        super().__init__(absolute=True)

    def __call__(self, evidence: Evidence) -> Floats:
        return np.array([_gini(np.sort(scores)) for scores in evidence.scores(absolute=True)])


def _gini(scores: Floats) -> float:
    n = len(scores)
    if not scores.any():
        return np.nan
    return float(1 - 2 * (scores / scores.sum() * (n - np.arange(1, n + 1) + 0.5) / n).sum())
