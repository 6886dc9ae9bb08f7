"""The tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from maskhooks.comparison.comparison import Comparison
from maskhooks.comparison.results import BreakEven, Test


def table(comparison: Comparison) -> pd.DataFrame:
    """Return the table of `Comparison.table`."""
    rows = comparison.table_rows
    columns: dict[tuple[str, str], list[float]] = {}
    for metric in comparison.metrics:
        for name in ("mean", "low", "high"):
            columns[metric, name] = [getattr(cell.interval, name) for cell in comparison.cells(metric)]
    columns["seconds per example", ""] = [comparison.timings[row.method].seconds for row in rows]
    names = [comparison.name(row) for row in rows]
    index = pd.Index(names, name="method")
    if len(comparison.sites) > 1:
        index = pd.MultiIndex.from_arrays([[row.site for row in rows], names], names=["site", "method"])
    return pd.DataFrame(columns, index=index)


def rows(comparison: Comparison) -> pd.DataFrame:
    """Return the table of `Comparison.rows`."""
    found = []
    for label in comparison.methods:
        for one in comparison.judged(label):
            about = {"method": label, "metric": one.metric, "site": one.site, "depth": one.depth}
            found.append(pd.DataFrame({**about, "example": one.examples, "value": one.values}))
    return pd.concat(found, ignore_index=True)


def summary(comparison: Comparison) -> pd.DataFrame:
    """Return the table of `Comparison.summary`."""
    found = []
    for metric, about in comparison.metrics.items():
        for cell in comparison.cells(metric):
            timing = comparison.timings[cell.row.method]
            found.append(
                {
                    "method": cell.row.method,
                    "site": cell.row.site,
                    "depth": cell.row.depth,
                    "metric": metric,
                    "mean": cell.interval.mean,
                    "low": cell.interval.low,
                    "high": cell.interval.high,
                    "confidence": comparison.confidence,
                    "examples": cell.interval.examples,
                    "undefined": cell.interval.undefined,
                    "better": about.better,
                    "unit": about.unit,
                    "best": cell.best,
                    "p_best": cell.p_best,
                    "seconds_per_example": timing.seconds,
                    "fit_seconds": math.nan if timing.fit_seconds is None else timing.fit_seconds,
                }
            )
    return pd.DataFrame(found)


def differences(comparison: Comparison, metric: str, tests: Sequence[Test]) -> pd.DataFrame:
    """Return the table of `Comparison.differences`."""
    columns = ["metric", "site", "first", "second", "difference", "low", "high", "p", "p_adjusted", "tests"]
    found = []
    for one in tests:
        mean = one.found.difference
        names = comparison.name(one.first), comparison.name(one.second)
        numbers = mean.mean, mean.low, mean.high, one.found.p_value, one.adjusted, len(tests)
        found.append((metric, one.first.site, *names, *numbers))
    return pd.DataFrame(found, columns=columns)


def break_even(found: Sequence[BreakEven]) -> pd.DataFrame:
    """Return the table of `Comparison.break_even`."""
    names = ["method", "other", "fit_seconds", "seconds", "other_seconds", "examples"]
    return pd.DataFrame([[getattr(one, name) for name in names] for one in found], columns=names)
