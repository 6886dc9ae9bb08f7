"""Measures of rankings: numbers of the scores of one example; NaN where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from maskhooks.metrics.evidence import Floats

Bools = npt.NDArray[np.bool_]
_BLOCK = 1024  # positions compared with all others at once


def ranks(scores: Floats) -> Floats:
    """Return the rank of each score from 1, the lowest first; equal scores share the mean of their ranks."""
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    found: Floats = (last - (count - 1) / 2)[which]
    return found


def in_top(scores: Floats, k: int) -> Floats:
    """Return the probability of each position to be among the k highest if equal scores are in random order."""
    if k >= len(scores):
        return np.ones(len(scores))
    cut = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, level = scores > cut, scores == cut
    found: Floats = np.where(level, (k - above.sum()) / level.sum(), above)
    return found


def auroc(scores: Floats, truth: Bools) -> float:
    """Return the area under the ROC curve, P(s_i > s_j) + P(s_i = s_j) / 2 for a true i and a false j, in [0, 1].

    NaN if all positions are true, or none is.
    """
    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return math.nan
    return float((ranks(scores)[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def average_precision(scores: Floats, truth: Bools) -> float:
    """Return sum_t (R_t - R_(t-1)) P_t over the distinct scores t as thresholds, highest first, in [0, 1].

    P_t and R_t are precision and recall of the positions with a score of at least t; no interpolation. NaN if no
    position is true.
    """
    if not truth.any():
        return math.nan
    _, which, count = np.unique(-scores, return_inverse=True, return_counts=True)
    true = np.bincount(which, truth)
    precision = np.cumsum(true) / np.cumsum(count)
    return float((precision * true).sum() / true.sum())


def precision_at(scores: Floats, truth: Bools, k: int) -> float:
    """Return the share of true positions among the k highest, expected over orders of equal scores, in [0, 1].

    If there are fewer than k positions, all of them. NaN if there is none.
    """
    return float(in_top(scores, k)[truth].sum() / min(k, len(scores))) if len(scores) else math.nan


def covering_rank(scores: Floats, truth: Bools) -> float:
    """Return how many of the highest scores cover all true positions, expected over orders of equal scores.

    From the number of true positions to the number of all. With m true positions among t at the lowest true score, and
    g above it: g + m (t + 1) / (m + 1). NaN if no position is true.
    """
    if not truth.any():
        return math.nan
    lowest = scores[truth].min()
    level = scores == lowest
    true, all_ = int((level & truth).sum()), int(level.sum())
    return float((scores > lowest).sum() + true * (all_ + 1) / (true + 1))


def kendall(first: Floats, other: Floats) -> float:
    """Return Kendall's tau-b, (C - D) / sqrt((C + D + T_1) (C + D + T_2)), in [-1, 1].

    C and D are the pairs of positions in the same and in the opposite order, T_1 and T_2 those equal in the first or
    the other alone. NaN if one of the two is constant.
    """
    order = equal_first = equal_other = 0
    for start in range(0, len(first), _BLOCK):
        one = np.sign(first[start : start + _BLOCK, None] - first)
        two = np.sign(other[start : start + _BLOCK, None] - other)
        order += int((one * two).sum())
        equal_first += int((one == 0).sum())
        equal_other += int((two == 0).sum())
    pairs = len(first) ** 2
    product = (pairs - equal_first) * (pairs - equal_other)
    return float(np.clip(order / math.sqrt(product), -1, 1)) if product else math.nan


def spearman(first: Floats, other: Floats) -> float:
    """Return Spearman's rho, the correlation of ranks, in [-1, 1]; equal scores share the mean of their ranks.

    NaN if one of the two is constant.
    """
    one, two = (ranks(scores) - (len(scores) + 1) / 2 for scores in (first, other))
    scale = math.sqrt(float((one * one).sum() * (two * two).sum()))
    return float(np.clip((one * two).sum() / scale, -1, 1)) if scale else math.nan


def overlap(first: Floats, other: Floats, k: int) -> float:
    """Return the share of the k highest of each that both have, expected over orders of equal scores, in [0, 1].

    The two orders are independent, so that two constant vectors of n positions have k / n, which is chance. NaN if
    there are no more than k positions.
    """
    return float((in_top(first, k) * in_top(other, k)).sum() / k) if len(first) > k else math.nan
