"""Metrics against a known truth, against loops over examples and positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from maskhooks import Explanation, Random
from maskhooks.errors import SettingError
from maskhooks.metrics.judgement import judge
from maskhooks.toy_tasks import digits
from tests.metrics import small

# The first position is [CLS], and does not count.
SCORES = [[9, 0.9, 0.2, 0.8, 0.1, 0.7], [9, 0.6, 0.6], [0, 0.1, 0.2, 0.3], [9, 0.9, 0.4, 0.4, 0.4, 0.0, 0.0, 0.9]]
TRUTH = [[1, 1, 0, 1, 1, 0], [0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0, 0]]


def explanation(scores: list[list[float]] = SCORES) -> Explanation:
    return small.explanation(small.hooked(), small.batch(), scores)


def values(metric: Any, truth: Any = TRUTH, scores: list[list[float]] = SCORES) -> list[float]:
    (found,) = judge(explanation(scores), metric, truth=truth)
    assert found.undefined == sum(map(math.isnan, found.values))
    result: list[float] = found.values.tolist()
    return result


def near(*wanted: float) -> Any:
    return pytest.approx(list(wanted), nan_ok=True)


def test_precision_recall_and_f1_of_what_is_kept() -> None:
    hits = [2, 1, 0, 1]  # scores above one half: 3, 2, 0, 2
    kept, true = [3, 2, 0, 2], [3, 1, 0, 3]
    assert values("precision") == near(2 / 3, 1 / 2, math.nan, 1 / 2)
    assert values("recall") == near(2 / 3, 1, math.nan, 1 / 3)
    assert values("f1") == near(
        *(2 * h / (k + t) if k + t else math.nan for h, k, t in zip(hits, kept, true, strict=True))
    )


def test_they_agree_with_sklearn() -> None:
    library = pytest.importorskip("sklearn.metrics")
    for name, function in (
        ("precision", library.precision_score),
        ("recall", library.recall_score),
        ("f1", library.f1_score),
    ):
        for found, scores, truth in zip(values(name), SCORES, TRUTH, strict=True):
            kept = np.array(scores[1:]) > 0.5
            assert found == pytest.approx(function(truth[1:], kept, zero_division=np.nan), nan_ok=True)


def test_the_highest_instead_of_what_is_kept() -> None:
    """Equal scores in expectation: of three at the second place, each is in the first two with one third."""
    assert values({"name": "precision", "top": 3})[3] == pytest.approx((1 + 1 / 3) / 3)
    assert values({"name": "recall", "top": 3})[3] == pytest.approx((1 + 1 / 3) / 3)
    assert values({"name": "f1", "top": 3})[3] == pytest.approx(2 * (1 + 1 / 3) / (3 + 3))
    assert values({"name": "precision", "top": 50})[0] == pytest.approx(3 / 5)


def test_optimality_is_one_for_a_minimal_set() -> None:
    sets = [[[0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1]], [0, 1, 0], [1, 0, 0, 0], [[0, 1, 0, 0, 0, 0, 0, 1]]]
    assert values("optimality", sets) == [1, 0, 1, 1]


def test_of_several_minimal_sets_the_one_that_suits_best_counts() -> None:
    first, second = [0, 1, 0, 0, 0, 1], [0, 1, 0, 1, 1, 0]
    rest = TRUTH[1:]
    both = values("recall", [[first, second], *rest])[0]
    assert both == max(values("recall", [one, *rest])[0] for one in (first, second)) == 1
    ranks = [values("mean-rank", [one, *rest])[0] for one in (first, second)]
    assert values("mean-rank", [[first, second], *rest])[0] == min(ranks) < max(ranks)


def test_planted_positions() -> None:
    assert values("precision-at-k") == near(2 / 3, 1 / 2, math.nan, (1 + 1 / 3) / 3)
    assert values({"name": "precision-at-k", "k": 1}) == near(1, 1 / 2, math.nan, 1 / 2)
    # 5 of 5 positions; 1 of two equal; three equal below two, one of which is true, then one of two equal
    assert values("mean-rank") == near(5, 1.5, math.nan, 5 + 1 * 3 / 2)


def test_auroc_and_average_precision_skip_what_is_not_defined() -> None:
    library = pytest.importorskip("sklearn.metrics")
    for name, function in (("auroc", library.roc_auc_score), ("average-precision", library.average_precision_score)):
        found = values(name)
        assert math.isnan(found[2])
        for example in (0, 1, 3):
            assert found[example] == pytest.approx(function(TRUTH[example][1:], SCORES[example][1:]))
        (judgement,) = judge(explanation(), name, truth=TRUTH)
        assert judgement.undefined == 1
        assert judgement.mean == pytest.approx(np.mean([found[example] for example in (0, 1, 3)]))


def test_distances_of_distributions() -> None:
    """In float64, position by position."""

    def shares(row: list[float]) -> list[float]:
        total = sum(row)
        return [one / total for one in row] if total else [1 / len(row)] * len(row)

    def kl(p: list[float], q: list[float]) -> float:
        return sum((a * math.log(a / b) if b else math.inf) if a else 0.0 for a, b in zip(p, q, strict=True))

    pairs = [(shares(t[1:]), shares(s[1:])) if any(t[1:]) else None for t, s in zip(TRUTH, SCORES, strict=True)]
    wanted = [math.nan if pair is None else kl(*pair) for pair in pairs]
    middles = [None if pair is None else [(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs]
    js = [
        math.nan if pair is None or middle is None else (kl(pair[0], middle) + kl(pair[1], middle)) / 2
        for pair, middle in zip(pairs, middles, strict=True)
    ]
    assert values("kl") == pytest.approx(wanted, nan_ok=True)
    assert math.isinf(values("kl")[3])
    assert values("js") == pytest.approx(js, nan_ok=True)


def test_the_digits_task_has_the_same_distances() -> None:
    data = digits.generate(60)[0][:60]
    with torch.random.fork_rng():
        wrapped = digits.hook(digits.DigitsModel().eval())
    batches = list(data.loader(16))
    given = Random(wrapped, digits.INPUT).explain_all(batches)
    wanted = digits.distances(digits.attribution(given, data), data)
    kl, js, precision = judge(given, ["kl", "js", "recall"], truth=data.truth())
    assert kl.mean == pytest.approx(wanted["kl"], rel=1e-4)
    assert js.mean == pytest.approx(wanted["js"], rel=1e-4)
    assert kl.undefined == js.undefined == precision.undefined == int((data.truth().sum(1) == 0).sum()) > 0
    (found,) = judge(given, "sufficiency", hooked=wrapped, batches=batches)  # of a yes or no
    assert found.undefined == 0


def test_scores_below_zero() -> None:
    scores = [[0, -0.9, 0.2, 0.8, 0.1, 0.7], *SCORES[1:]]
    assert values({"name": "auroc", "absolute": True}, scores=scores) == near(*values("auroc"))
    assert values("auroc", scores=scores)[0] < values("auroc")[0]
    with pytest.raises(SettingError, match=r"needs scores from 0.*'absolute': True"):
        values("kl", scores=scores)
    assert values({"name": "kl", "absolute": True}, scores=scores) == near(*values("kl"))


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (TRUTH[:3], "no truth for example 3"),
        ([*TRUTH[:3], [1, 0]], r"truth of example 3 has shape \[1, 2\], but there is a position 7"),
        ([[1, 1, -1, 1, 1, 0], *TRUTH[1:]], "truth of example 0"),
        ([["a"] * 6, *TRUTH[1:]], "no truth for example 0"),
    ],
)
def test_a_truth_that_does_not_fit(truth: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        values("auroc", truth)


def test_truths_are_found_by_the_index_of_an_example() -> None:
    given = explanation()
    later = dataclasses.replace(given, columns={**given.columns, "example": given.columns["example"] + 70})
    (found,) = judge(later, "recall", truth={70 + index: row for index, row in enumerate(TRUTH)})
    assert found.examples.tolist() == [70, 71, 72, 73]
    assert found.values.tolist() == near(*values("recall"))
