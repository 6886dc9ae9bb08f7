"""Measures of rankings, against loops over pairs and over all orders of equal scores, and against SciPy and sklearn."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from maskhooks.metrics.evidence import Floats
from maskhooks.metrics.ranking import (
    Bools,
    auroc,
    average_precision,
    covering_rank,
    in_top,
    kendall,
    overlap,
    precision_at,
    ranks,
    spearman,
)


def cases(count: int = 60) -> Iterator[tuple[Floats, Floats, Bools]]:
    """Scores with and without ties, other scores, and truths with at least one true and one false position."""
    draw = np.random.default_rng(0)
    for number in range(count):
        n = int(draw.integers(2, 7))
        scores, others = (draw.integers(0, 3, n) if number % 2 else draw.normal(size=n) for _ in range(2))
        truth = draw.permutation(np.arange(n) < draw.integers(1, n))
        yield scores.astype(float), others.astype(float), truth


def orders(scores: Floats) -> list[list[int]]:
    """All orders of positions in which no score is below a later one."""
    found = itertools.permutations(range(len(scores)))
    return [list(order) for order in found if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))]


def test_ranks_share_their_mean() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 0.0, 3.0])).tolist() == [4, 2, 4, 1, 4]


def test_measures_are_means_over_all_orders_of_equal_scores() -> None:
    for scores, others, truth in cases():
        own, theirs, true = orders(scores), orders(others), int(truth.sum())
        for k in range(1, len(scores)):
            inside = [np.isin(np.arange(len(scores)), order[:k]) for order in own]
            other = [np.isin(np.arange(len(scores)), order[:k]) for order in theirs]
            assert in_top(scores, k) == pytest.approx(np.mean(inside, axis=0))
            assert precision_at(scores, truth, k) == pytest.approx(np.mean([one[truth].sum() / k for one in inside]))
            shared = np.mean([(one & two).sum() / k for one in inside for two in other])
            assert overlap(scores, others, k) == pytest.approx(shared)
        covered = [max(place + 1 for place, position in enumerate(order) if truth[position]) for order in own]
        assert covering_rank(scores, truth) == pytest.approx(np.mean(covered))
        assert true <= covering_rank(scores, truth) <= len(scores)


def test_auroc_is_the_chance_that_a_true_position_scores_higher() -> None:
    for scores, _, truth in cases():
        pairs = [(a, b) for a in scores[truth] for b in scores[~truth]]
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
        assert auroc(scores, truth) == pytest.approx(np.mean(wins))


def test_kendall_counts_pairs_and_spearman_correlates_ranks() -> None:
    for first, other, _ in cases():
        pairs = list(itertools.combinations(range(len(first)), 2))
        signs = [(np.sign(first[a] - first[b]), np.sign(other[a] - other[b])) for a, b in pairs]
        same, opposite = (sum(one * two == sign for one, two in signs) for sign in (1, -1))
        only_first = sum(one == 0 != two for one, two in signs)
        only_other = sum(one != 0 == two for one, two in signs)
        scale = math.sqrt((same + opposite + only_first) * (same + opposite + only_other))
        tau = kendall(first, other)
        assert tau == pytest.approx((same - opposite) / scale) if scale else math.isnan(tau)
        means = [
            [sum(b < a for b in line) + (sum(b == a for b in line) + 1) / 2 for a in line] for line in (first, other)
        ]
        rho = spearman(first, other)
        assert rho == pytest.approx(np.corrcoef(means)[0, 1]) if scale else math.isnan(rho)


def test_sklearn_gives_the_same() -> None:
    library = pytest.importorskip("sklearn.metrics")
    for scores, _, truth in cases():
        assert auroc(scores, truth) == pytest.approx(library.roc_auc_score(truth, scores))
        assert average_precision(scores, truth) == pytest.approx(library.average_precision_score(truth, scores))


def test_scipy_gives_the_same() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    large = [(draw.integers(0, 50, 3000).astype(float), draw.normal(size=3000))]  # more than a block
    for first, other in [*((one, two) for one, two, _ in cases()), *large]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant scores
            tau, rho = stats.kendalltau(first, other).statistic, stats.spearmanr(first, other).statistic
        assert kendall(first, other) == pytest.approx(tau, nan_ok=True)
        assert spearman(first, other) == pytest.approx(rho, nan_ok=True)


def test_what_is_not_defined() -> None:
    level, rising = np.ones(4), np.arange(4.0)
    nothing, everything = np.zeros(4, bool), np.ones(4, bool)
    undefined = [
        kendall(level, rising),
        spearman(rising, level),
        auroc(rising, nothing),
        auroc(rising, everything),
        average_precision(rising, nothing),
        covering_rank(rising, nothing),
        overlap(rising, rising, 4),
        kendall(np.ones(1), np.ones(1)),
    ]
    assert all(map(math.isnan, undefined))
    assert auroc(level, np.array([True, False, False, True])) == 0.5
    assert overlap(level, level, 2) == 0.5  # chance, not full agreement
    assert kendall(np.array([1.0, 0, 0, 1, 0]), np.array([5.0, 2, 1, 4, 3])) == pytest.approx(0.775, abs=5e-4)
