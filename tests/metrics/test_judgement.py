"""Judgements: by name, over sites and depths, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from maskhooks import Explanation
from maskhooks.errors import SettingError, UnknownNameError
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.judgement import judge, table
from maskhooks.metrics.metric import Metric
from tests.metrics import small

TRUTH = [[number % 2 for number in range(length)] for length in small.LENGTHS]


def explanation(scores: Any = None) -> Explanation:
    return small.explanation(small.hooked(), small.batch(), small.scores() if scores is None else scores)


def two_depths() -> Explanation:
    parts = [explanation(small.scores(seed=seed)) for seed in (0, 1)]
    parts[1] = dataclasses.replace(parts[1], columns={**parts[1].columns, "depth": parts[1]["depth"] + 2})
    return Explanation.concat(parts)


def test_each_site_and_depth_is_judged_by_each_metric() -> None:
    found = judge(two_depths(), ["auroc", {"name": "precision", "top": 2}], truth=TRUTH)
    assert [(one.metric.name, one.site, one.depth) for one in found] == [
        ("auroc", small.SITE, 0),
        ("precision", small.SITE, 0),
        ("auroc", small.SITE, 2),
        ("precision", small.SITE, 2),
    ]
    alone = judge(explanation(small.scores(seed=1)), "auroc", truth=TRUTH)
    assert found[2].values.tolist() == alone[0].values.tolist()
    rows = table(found)
    assert rows["mean"].tolist() == [one.mean for one in found]
    assert rows["undefined"].tolist() == [0] * 4
    assert rows["better"].tolist() == ["higher"] * 4


class Half(Metric):
    """Not defined for every second example."""

    name = "half"
    better = "higher"
    range = (0.0, 1.0)
    unit = ""
    source = "this test"

    def __call__(self, evidence: Evidence) -> Floats:
        return np.where(evidence.examples % 2, math.nan, 1.0)


class Short(Half):
    """One value for all."""

    def __call__(self, evidence: Evidence) -> Floats:
        return np.ones(1)


def test_what_is_not_defined_is_counted() -> None:
    (found,) = judge(explanation(), Half())
    assert found.undefined == 2
    assert found.defined.tolist() == [True, False, True, False]
    assert found.mean == 1
    assert "mean 1 over 2 examples, undefined for 2; higher is better" in repr(found)
    assert table([found])["undefined"].tolist() == [2]
    (nothing,) = judge(explanation().select(example=1), Half())
    assert math.isnan(nothing.mean)


def test_a_metric_gives_a_number_for_each_example() -> None:
    with pytest.raises(SettingError, match=r"returned values of shape \[1\] for 4 examples"):
        judge(explanation(), Short())


def test_an_unknown_metric_and_a_wrong_setting() -> None:
    with pytest.raises(UnknownNameError, match=r"'comprehensivness'.*Did you mean 'comprehensiveness'"):
        judge(explanation(), "comprehensivness")
    with pytest.raises(SettingError, match=r"the metric 'precision' has no setting 'tops'\. Did you mean 'top'"):
        judge(explanation(), {"name": "precision", "tops": 2}, truth=TRUTH)
    with pytest.raises(SettingError, match="top must be a whole number from 1 or None, got 0"):
        judge(explanation(), {"name": "precision", "top": 0}, truth=TRUTH)


def test_a_metric_that_lacks_what_it_needs() -> None:
    with pytest.raises(SettingError, match="the metric 'auroc' needs what each example needs, truth="):
        judge(explanation(), ["kendall", "auroc"], others=[explanation()])


def test_scores_that_are_nan() -> None:
    given = explanation()
    at = int(np.flatnonzero((given["example"] == 1) & (given["position"] == 2))[0])
    given["score"][at] = math.nan
    with pytest.raises(SettingError, match="NaN or infinite, first at position 2 of example 1"):
        judge(given, "auroc", truth=TRUTH)
    assert judge(given.select(example=[0, 2, 3]), "auroc", truth=TRUTH)


def test_padding_may_hold_nan() -> None:
    given = explanation()
    given["score"][~given["valid"]] = math.nan
    (found,), (wanted,) = judge(given, "auroc", truth=TRUTH), judge(explanation(), "auroc", truth=TRUTH)
    assert found.values.tolist() == wanted.values.tolist()


def test_an_example_without_positions() -> None:
    lengths = (4, 1, 3)  # [CLS] alone
    given = small.explanation(small.hooked(), small.batch(lengths), small.scores(lengths))
    with pytest.raises(SettingError, match=r"example 1 has no position that counts at embedding:output"):
        judge(given, "auroc", truth=TRUTH)
    without_rows = dataclasses.replace(given, metadata={number: {} for number in range(4)})
    with pytest.raises(SettingError, match="example 3 has no position"):
        judge(without_rows, "auroc", truth=[[0, 1, 1, 0]] * 4, counts=lambda label: True)
    assert judge(given, "auroc", truth=[[0, 1, 1, 0]] * 3, counts=lambda label: True)


def test_an_explanation_without_rows() -> None:
    with pytest.raises(SettingError, match="no rows"):
        judge(explanation().select(valid=False).select(), "auroc", truth=TRUTH)
