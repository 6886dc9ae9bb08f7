"""Agreement between explanations, example by example."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from maskhooks import Explanation
from maskhooks.errors import SettingError
from maskhooks.explanations.analyses import seed_deviation
from maskhooks.metrics.judgement import judge
from maskhooks.metrics.ranking import kendall, overlap, spearman
from tests.metrics import small

NAMES = ("kendall", "spearman", "top-k-overlap")


def explanation(scores: Sequence[Any], lengths: Sequence[int] = small.LENGTHS, **options: Any) -> Explanation:
    return small.explanation(small.hooked(), small.batch(lengths), scores, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_value_is_the_mean_over_others_of_valid_positions_without_special_tokens(name: str, absolute: bool) -> None:
    first, *others = (small.scores(seed=seed) for seed in range(3))
    measure = {"kendall": kendall, "spearman": spearman, "top-k-overlap": lambda a, b: overlap(a, b, 2)}[name]
    metric = {"name": name, "absolute": absolute}
    (found,) = judge(explanation(first), metric, others=[explanation(other) for other in others])
    for example, row in enumerate(first):
        rows = [np.asarray(one[1:], np.float64) for one in (row, *(other[example] for other in others))]
        rows = [np.abs(one) for one in rows] if absolute else rows
        wanted = np.mean([measure(rows[0], other) for other in rows[1:]])
        assert found.values[example] == pytest.approx(wanted, nan_ok=True)
    assert found.undefined == (1 if name == "top-k-overlap" else 0)  # one text has two positions that count


def test_constant_scores_are_not_defined_and_not_zero() -> None:
    first, second, third = (small.scores(seed=seed) for seed in range(3))
    second[0] = np.ones(6)
    others = [explanation(second), explanation(third)]
    for name in ("kendall", "spearman"):
        (found,) = judge(explanation(first), name, others=others)
        assert math.isnan(found.values[0])
        assert found.undefined == 1
        assert found.mean == pytest.approx(found.values[1:].mean())
        assert "undefined for 1" in repr(found)


def test_the_deviation_over_seeds_is_that_of_the_analyses() -> None:
    lengths = (5, 5, 5)  # the analyses average over positions, which is the mean over examples at equal lengths
    scores = [small.scores(lengths, seed) for seed in range(4)]
    given = [explanation(one, lengths) for one in scores]
    (found,) = judge(given[0], "seed-deviation", others=given[1:], counts=lambda label: True)
    assert found.mean == pytest.approx(seed_deviation(given)[-1].deviation)
    for example in range(3):
        columns = np.stack([one[example] for one in scores]).astype(float)
        each = [math.sqrt(sum((x - column.mean()) ** 2 for x in column) / 3) for column in columns.T]
        assert found.values[example] == pytest.approx(np.mean(each))


def test_rows_in_another_order_and_other_examples_do_not_matter() -> None:
    first, second = small.scores(seed=0), small.scores(seed=1)
    given, other = explanation(first), explanation(second)
    order = np.random.default_rng(0).permutation(len(other))
    shuffled = dataclasses.replace(other, columns={name: column[order] for name, column in other.columns.items()})
    (wanted,) = judge(given, "kendall", others=[other])
    (found,) = judge(given, "kendall", others=[shuffled])
    assert found.values.tolist() == pytest.approx(wanted.values.tolist())
    (some,) = judge(given.select(example=[1, 3]), "kendall", others=[other])
    assert some.values.tolist() == pytest.approx(wanted.values[[1, 3]].tolist())


def test_another_depth_of_the_same_site() -> None:
    """An input's masks may be read from a deeper site than the scores that they are compared with."""
    given, other = explanation(small.scores(seed=0)), explanation(small.scores(seed=1))
    deeper = dataclasses.replace(other, columns={**other.columns, "depth": other.columns["depth"] + 3})
    (found,), (wanted,) = (judge(given, "kendall", others=[one]) for one in (deeper, other))
    assert found.values.tolist() == wanted.values.tolist()


def test_others_that_do_not_fit() -> None:
    given = explanation(small.scores())
    wrapped, inputs = small.hooked(), small.batch(seed=4)
    hidden = explanation(small.scores(), site="first:output")
    two = Explanation.concat(
        [dataclasses.replace(given, columns={**given.columns, "depth": given["depth"] + by}) for by in (1, 2)]
    )
    for other, message in (
        (small.explanation(wrapped, inputs, small.scores()), "other positions at embedding:output.*label"),
        (hidden, "no scores of embedding:output"),
        (two, "at depth 0; there it has the depths 1, 2"),
        (given.select(example=[0, 1]), "valid positions here"),
    ):
        with pytest.raises(SettingError, match=message):
            judge(given, "kendall", others=[other])
    broken = explanation(small.scores())
    broken["score"][2] = math.nan
    with pytest.raises(SettingError, match="1 scores at embedding:output are NaN"):
        judge(given, "kendall", others=[broken])
    with pytest.raises(SettingError, match="'kendall' needs other explanations"):
        judge(given, "kendall")
