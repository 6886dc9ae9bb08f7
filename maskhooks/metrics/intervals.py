"""Intervals and tests for means over examples: bootstrap, paired permutations, several comparisons.

Examples are the unit. Choose a family of comparisons before you see values, and adjust its p-values by `holm`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt

from maskhooks.errors import MissingExtraError, SettingError
from maskhooks.metrics.evidence import Floats
from maskhooks.metrics.judgement import Judgement
from maskhooks.seeds import seeded
from maskhooks.settings.schema import checked
from maskhooks.settings.types import Count, Seed

#: A probability between 0 and 1.
Confidence = Annotated[float, Gt(0), Lt(1)]

_BOOTSTRAP, _PERMUTATION = 420, 421  # the purposes of random numbers
_NUMBERS = 2**22  # resampled numbers in memory at once


@dataclass(frozen=True)
class Interval:
    """A mean over examples with its confidence interval.

    Attributes:
        mean: the mean.
        low, high: the ends of the interval.
        confidence: its nominal coverage.
        method: "BCa", bias-corrected and accelerated (Efron 1987); or "percentile" where that is not defined, as for
            equal values.
        examples: the number of examples that have a value.
        undefined: the number that have none, and do not count.
    """

    mean: float
    low: float
    high: float
    confidence: float
    method: str
    examples: int
    undefined: int


@dataclass(frozen=True)
class Difference:
    """The difference of two judgements of the same examples by one metric.

    Attributes:
        difference: the mean of first minus second over examples that have both values, with its interval.
        p_value: of a paired permutation test that the two do not differ, two-sided.
    """

    difference: Interval
    p_value: float


@checked
def interval(judged: Judgement, *, confidence: Confidence = 0.95, resamples: Count = 9999, seed: Seed = 0) -> Interval:
    """Return the mean of a judgement with a bootstrap interval over examples.

    Args:
        judged: the values; those that are not defined do not count, and are reported.
        confidence: the nominal coverage.
        resamples: the number of bootstrap samples.
        seed: the random seed.

    Raises:
        MissingExtraError: SciPy is not installed.
        SettingError: fewer than two examples have a value, or one is infinite.
    """
    return _interval(judged.values, confidence, resamples, seed)


@checked
def difference(
    first: Judgement, second: Judgement, *, confidence: Confidence = 0.95, resamples: Count = 9999, seed: Seed = 0
) -> Difference:
    """Return the mean difference of two judgements of the same examples by one metric, its interval and a p-value.

    The test flips the sign of each example's difference at random, or in all ways if there are no more than
    `resamples`. The p-value is twice the smaller of the shares of mean differences that are at most, and at least, the
    one observed, as SciPy's `permutation_test` computes it.

    Args:
        first, second: the judgements, such as of two explainers. Examples without a value in either do not count.
        confidence: the nominal coverage of the interval.
        resamples: the number of bootstrap samples, and of random permutations.
        seed: the random seed.

    Raises:
        MissingExtraError: SciPy is not installed.
        SettingError: the judgements are by other metrics or of other examples, fewer than two examples have both
            values, or one is infinite.
    """
    own, other = ({"name": one.metric.name, **one.metric.settings()} for one in (first, second))
    if own != other:
        unlike = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
        raise SettingError(
            f"the two judgements differ in {', '.join(unlike)}: {[own.get(key) for key in unlike]} and "
            f"{[other.get(key) for key in unlike]}. Judge both with the same metric and settings"
        )
    if not np.array_equal(first.examples, second.examples):
        raise SettingError("the two judgements are of other examples. Judge explanations of the same examples")
    values = first.values - second.values
    found = _interval(values, confidence, resamples, seed)
    stats = _scipy()
    defined = values[~np.isnan(values)]
    result = stats.permutation_test(
        (defined,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _NUMBERS // len(defined)),
        rng=np.random.default_rng(seeded(seed, _PERMUTATION)),
    )
    return Difference(found, float(result.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for a family of comparisons (Holm 1979): reject those of at most the wanted level.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_(j), at most 1. The family-wise error is then at
    most the level, however the comparisons depend on each other.

    Args:
        p_values: by comparison.

    Raises:
        SettingError: a p-value is not in [0, 1].
    """
    wrong = [name for name, p in p_values.items() if not 0 <= p <= 1]
    if wrong:
        raise SettingError(f"the p-value of {wrong[0]!r} is {p_values[wrong[0]]}, which is not from 0 to 1")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - number) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _interval(values: Floats, confidence: float, resamples: int, seed: int) -> Interval:
    stats = _scipy()
    defined = values[~np.isnan(values)]
    if len(defined) < 2 or not np.isfinite(defined).all():
        raise SettingError(
            f"an interval needs at least two examples with a finite value; {len(defined)} of {len(values)} have a "
            f"value, and {int(np.isinf(defined).sum())} of these are infinite"
        )
    low = high = np.nan
    for method in ("percentile",) if np.ptp(defined) == 0 else ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            low, high = stats.bootstrap(
                (defined,),
                np.mean,
                method=method,
                confidence_level=confidence,
                n_resamples=resamples,
                batch=max(1, _NUMBERS // len(defined)),
                vectorized=True,
                rng=np.random.default_rng(seeded(seed, _BOOTSTRAP)),
            ).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return Interval(
        mean=float(defined.mean()),
        low=float(low),
        high=float(high),
        confidence=confidence,
        method=method,
        examples=len(defined),
        undefined=len(values) - len(defined),
    )


@checked
def means(
    values: Any, *, confidence: Confidence = 0.95, resamples: Count = 999, seed: Seed = 0
) -> tuple[Floats, Floats, Floats]:
    """Return the means over examples of several numbers, such as of curves, and the ends of their intervals.

    Args:
        values: `[example, number]`; rows with NaN do not count.
        confidence: the nominal coverage of each interval alone; percentiles of bootstrap samples of whole examples.
        resamples: the number of bootstrap samples.
        seed: the random seed.

    Returns:
        Means, lower and upper ends; the ends are NaN for fewer than two examples.
    """
    rows = np.asarray(values, np.float64)
    rows = rows[np.isfinite(rows).all(1)]
    if len(rows) < 2:
        nothing = np.full(rows.shape[1], np.nan)
        return (rows[0] if len(rows) else nothing), nothing, nothing
    draws = np.random.default_rng(seeded(seed, _BOOTSTRAP))
    weights = draws.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples) / len(rows)
    low, high = np.quantile(weights @ rows, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return rows.mean(0), low, high


def check_scipy() -> None:
    """Raise MissingExtraError if SciPy is not installed."""
    _scipy()


def _scipy() -> ModuleType:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "metrics", "an interval or a test of means") from error
    found: ModuleType = stats
    return found
