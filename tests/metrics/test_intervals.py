"""Intervals and tests: against a bootstrap, a permutation test and Holm's rule written out."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest

from maskhooks.errors import MissingExtraError, SettingError
from maskhooks.metrics.erasure import MoRF
from maskhooks.metrics.evidence import Floats
from maskhooks.metrics.intervals import difference, holm, interval, means
from maskhooks.metrics.judgement import Judgement
from maskhooks.metrics.metric import Metric
from maskhooks.metrics.truth import AUROC


def judgement(values: Any, metric: Metric | None = None) -> Judgement:
    array = np.asarray(values, np.float64)
    return Judgement(metric or AUROC(), "embedding:output", 0, np.arange(len(array)), array)


def draws(count: int, seed: int = 0) -> Floats:
    """Skewed, so that BCa is not the percentile interval."""
    found: Floats = np.random.default_rng(seed).exponential(size=count)
    return found


@pytest.fixture
def _scipy() -> None:
    pytest.importorskip("scipy.stats")


def normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def quantile(p: float) -> float:
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if normal(middle) < p else (low, middle)
    return low


@pytest.mark.usefixtures("_scipy")
class TestIntervals:
    def test_bca_written_out(self) -> None:
        """Efron 1987: bias correction from the resampled means, acceleration from the jackknife."""
        values = draws(40)
        found = interval(judgement(values), confidence=0.9, resamples=20_000)
        means = np.random.default_rng(5).choice(values, (20_000, 40)).mean(1)
        z = quantile(float((means < values.mean()).mean()))
        left_out = np.array([np.delete(values, at).mean() for at in range(40)])
        apart = left_out.mean() - left_out
        a = float((apart**3).sum() / (6 * (apart**2).sum() ** 1.5))
        ends = []
        for p in (0.05, 0.95):
            shifted = z + quantile(p)
            ends.append(np.quantile(means, normal(z + shifted / (1 - a * shifted))))
        assert [found.low, found.high] == pytest.approx(ends, abs=0.02)
        assert found.method == "BCa"
        assert found.mean == pytest.approx(values.mean())
        assert found.low != pytest.approx(np.quantile(means, 0.05), abs=0.005)  # the percentile interval

    def test_a_wanted_share_of_intervals_holds_the_mean(self) -> None:
        inside = 0
        for seed in range(100):
            found = interval(judgement(draws(60, seed)), confidence=0.8, resamples=500)
            inside += found.low <= 1 <= found.high
        assert 68 <= inside <= 90

    def test_what_is_not_defined_is_reported(self) -> None:
        values = draws(30)
        found = interval(judgement([*values, math.nan, math.nan]))
        assert (found.examples, found.undefined) == (30, 2)
        assert found.mean == pytest.approx(values.mean())

    def test_equal_values_have_a_percentile_interval(self) -> None:
        found = interval(judgement([0.25] * 10))
        assert (found.low, found.mean, found.high, found.method) == (0.25, 0.25, 0.25, "percentile")

    def test_a_seed_gives_the_same_interval(self) -> None:
        values = judgement(draws(20))
        assert interval(values, resamples=200) == interval(values, resamples=200)
        assert interval(values, resamples=200) != interval(values, resamples=200, seed=1)

    @pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [1.0, 2.0, math.inf]])
    def test_too_few_or_infinite_values(self, values: list[float]) -> None:
        with pytest.raises(SettingError, match="at least two examples with a finite value"):
            interval(judgement(values))

    def test_a_wrong_setting(self) -> None:
        with pytest.raises(SettingError, match="confidence must be a number above 0 and below 1, got 95"):
            interval(judgement(draws(5)), confidence=95)


@pytest.mark.usefixtures("_scipy")
class TestComparisons:
    def test_all_ways_to_flip_signs(self) -> None:
        first, second = draws(9), draws(9, 1)
        found = difference(judgement(first), judgement(second))
        flips = [np.mean(signs * (first - second)) for signs in itertools.product((1, -1), repeat=9)]
        mean = float(np.mean(first - second))
        tails = [np.mean([flip <= mean + 1e-12 for flip in flips]), np.mean([flip >= mean - 1e-12 for flip in flips])]
        assert found.p_value == pytest.approx(min(1.0, 2 * min(tails)))
        assert found.difference.mean == pytest.approx(mean)
        assert found.difference.low < mean < found.difference.high

    def test_random_flips(self) -> None:
        first, second = draws(60), draws(60, 1) + 0.2
        found = difference(judgement(first), judgement(second), resamples=4000)
        signs = np.random.default_rng(3).choice([-1, 1], (20_000, 60))
        flips, mean = (signs * (first - second)).mean(1), float(np.mean(first - second))
        assert found.p_value == pytest.approx(2 * min(np.mean(flips <= mean), np.mean(flips >= mean)), abs=0.03)

    def test_pairs_without_a_value_do_not_count(self) -> None:
        first, second = draws(12), draws(12, 1)
        whole = difference(judgement(first[2:]), judgement(second[2:]))
        first[0] = second[1] = math.nan
        found = difference(judgement(first), judgement(second))
        assert (found.difference.examples, found.difference.undefined) == (10, 2)
        assert found.p_value == whole.p_value

    def test_equal_judgements_do_not_differ(self) -> None:
        found = difference(judgement(draws(8)), judgement(draws(8)))
        assert found.p_value == 1
        assert found.difference.method == "percentile"
        assert found.difference.low == found.difference.high == 0

    def test_judgements_of_something_else(self) -> None:
        values = judgement(draws(5))
        with pytest.raises(SettingError, match="differ in absolute"):
            difference(values, judgement(draws(5), AUROC(absolute=True)))
        with pytest.raises(SettingError, match=r"differ in .*name"):
            difference(values, judgement(draws(5), MoRF()))
        with pytest.raises(SettingError, match="of other examples"):
            difference(values, judgement(draws(6)))


def test_holm_written_out() -> None:
    """In order .005, .01, .03, .04: 4 p, 3 p, then 2 p, which the next one's p may not undercut."""
    given = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(given) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm(given)) == list(given)
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(SettingError, match=r"'a' is 1\.5"):
        holm({"a": 1.5})


def test_scipy_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    for call in (lambda: interval(judgement(draws(5))), lambda: difference(judgement(draws(5)), judgement(draws(5)))):
        with pytest.raises(MissingExtraError, match=r"pip install 'maskhooks\[metrics\]'"):
            call()


def test_means_of_curves() -> None:
    values = np.stack([draws(30), draws(30, 1) + 5], 1)
    values[3, 1] = math.nan  # the example does not count
    middle, low, high = means(values, confidence=0.9, resamples=4000)
    known = np.delete(values, 3, 0)
    assert middle == pytest.approx(known.mean(0))
    error = known.std(0, ddof=0) / math.sqrt(29)
    assert low == pytest.approx(known.mean(0) - 1.645 * error, abs=0.3 * error.max())
    assert high == pytest.approx(known.mean(0) + 1.645 * error, abs=0.3 * error.max())
    alone, nothing, _ = means(values[:1])
    assert alone == pytest.approx(values[0])
    assert np.isnan(nothing).all()
    assert np.isnan(means(values[3:4])[0]).all()
