"""Comparison: methods side by side, by metrics, with intervals, tests and times."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskhooks.atomic_write import atomic_open
from maskhooks.comparison.judging import Judged
from maskhooks.comparison.known_metric import KnownMetric
from maskhooks.comparison.results import BreakEven, Cell, Row, Test, Timing
from maskhooks.comparison.store import Store
from maskhooks.errors import SettingError, UnknownNameError, close_matches
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.score_labels import RANDOM, score_label
from maskhooks.metrics.erasure import Curves
from maskhooks.metrics.evidence import Floats, not_special
from maskhooks.metrics.intervals import Confidence, Difference, Interval, difference, holm, interval
from maskhooks.metrics.judgement import Judgement, judge
from maskhooks.metrics.metric import Metric
from maskhooks.settings.schema import checked
from maskhooks.settings.types import Folder

if TYPE_CHECKING:
    import pandas as pd


class Comparison:
    """What `compare` returns, and `Comparison.load` reads: the batches that all methods have explained by then.

    Attributes:
        settings: what was compared: model, methods, metrics, data, seed.
        metrics: the metrics by label.
        confidence: the nominal coverage of intervals.
    """

    @checked
    def __init__(
        self, store: Store, *, confidence: Confidence = 0.95, counts: Callable[[str], bool] = not_special
    ) -> None:
        self.settings, self.confidence = store.settings, confidence
        self.metrics: dict[str, Metric] = {name: KnownMetric(one) for name, one in store.settings["metrics"].items()}
        self._store, self._counts = store, counts
        self._tested: dict[tuple[str, str | None], list[Test]] = {}
        self._told: dict[str, list[Cell]] = {}
        if not store.numbers:
            raise SettingError("this comparison has no results yet. Run the same comparison again to go on with it")

    def __repr__(self) -> str:
        what = f"{len(self.methods)} methods, {len(self.metrics)} metrics, {len(self.examples)} examples"
        return f"Comparison({what})"

    def _repr_html_(self) -> str:
        return str(self.table().to_html(float_format="{:.3f}".format))

    # What there is

    @property
    def methods(self) -> list[str]:
        """The labels of the methods."""
        return self._store.labels

    @functools.cached_property
    def explanations(self) -> dict[str, Explanation]:
        """The scores of each method, by label."""
        return {label: Explanation.concat([one.explanation for one in self._parts(label)]) for label in self.methods}

    @functools.cached_property
    def judgements(self) -> dict[str, dict[str, list[Judgement]]]:
        """By method and metric: a judgement for each masked site and depth, with the value of each example."""
        return {label: self._judgements(label) for label in self.methods}

    @functools.cached_property
    def timings(self) -> dict[str, Timing]:
        """How long each method took, by label."""
        return {label: self._timing(label) for label in self.methods}

    @functools.cached_property
    def examples(self) -> list[int]:
        """The indices of the examples."""
        return sorted({int(number) for one in self._every() for number in one.examples})

    @functools.cached_property
    def sites(self) -> list[str]:
        """The addresses of the masked sites."""
        return list(dict.fromkeys(one.site for one in self._every()))

    @functools.cached_property
    def table_rows(self) -> list[Row]:
        """A row for each site, method and depth, in this order."""
        rows = {Row(label, one.site, one.depth) for label in self.methods for one in self.judged(label)}
        return sorted(rows, key=lambda row: (self.sites.index(row.site), self.methods.index(row.method), row.depth))

    def name(self, row: Row) -> str:
        """Return what a row is called: the method, with its depth if it has several at the site."""
        depths = {one.depth for one in self.table_rows if (one.method, one.site) == (row.method, row.site)}
        return row.method if len(depths) == 1 else f"{row.method}, depth {row.depth}"

    # Results

    def cells(self, metric: str) -> list[Cell]:
        """Return what a metric says of each row.

        Raises:
            UnknownNameError: the comparison has no such metric.
        """
        self._check_metric(metric)
        if metric not in self._told:
            self._told[metric] = self._cells(metric)
        return self._told[metric]

    def tests(self, metric: str, *, against: str | None = None) -> list[Test]:
        """Return the difference of each two rows at one site by a metric, tested and adjusted.

        The tests are paired permutation tests over examples. Their family is all of them, over all sites; it does not
        depend on the values, as a choice of the best method would.

        Args:
            metric: its label.
            against: the label of a method; only its differences from the others are tested, which are fewer. Choose it
                before you see the values.

        Raises:
            UnknownNameError: the comparison has no such metric or method.
        """
        self._check_metric(metric)
        if against is not None and against not in self.methods:
            raise UnknownNameError(
                f"no method is called {against!r}. The methods are {', '.join(self.methods)}.",
                near=close_matches(against, self.methods),
            )
        if (metric, against) not in self._tested:
            self._tested[metric, against] = self._test(metric, against)
        return self._tested[metric, against]

    def _test(self, metric: str, against: str | None) -> list[Test]:
        pairs = [
            (one, other)
            for one, other in itertools.combinations(self.table_rows, 2)
            if one.site == other.site and (against is None or (one.method == against) != (other.method == against))
        ]
        if against is not None:
            pairs = [pair if pair[0].method == against else pair[::-1] for pair in pairs]
        found: dict[tuple[Row, Row], Difference] = {}
        for one, other in pairs:
            values = [self._value(metric, row).values for row in (one, other)]
            if _testable(values[0] - values[1]):
                found[one, other] = difference(
                    self._value(metric, one), self._value(metric, other), confidence=self.confidence, seed=self._seed
                )
        names = {str(number): pair for number, pair in enumerate(found)}
        adjusted = holm({number: found[pair].p_value for number, pair in names.items()})
        return [Test(*pair, found[pair], adjusted[number]) for number, pair in names.items()]

    def _cells(self, metric: str) -> list[Cell]:
        sign = 1 if self.metrics[metric].better == "higher" else -1
        p_values = {frozenset((one.first, one.second)): one.adjusted for one in self.tests(metric)}
        found: list[Cell] = []
        for site in self.sites:
            rows = [row for row in self.table_rows if row.site == site]
            means = {row: sign * self._value(metric, row).mean for row in rows}
            known = [row for row in rows if not math.isnan(means[row])]
            best = max(known, key=lambda row: means[row]) if known else None
            for row in rows:
                judged = self._value(metric, row)
                is_best = best is not None and means[row] == means[best]
                p_best = 1.0 if is_best else p_values.get(frozenset((row, best)), math.nan) if best else math.nan
                found.append(Cell(row, metric, judged, self._interval(judged), is_best, p_best))
        return found

    def differences(self, metric: str, *, against: str | None = None) -> pd.DataFrame:
        """Return `tests` as a table: first, second, site; difference (first minus second), low, high, p, p_adjusted.

        The column `tests` is the number of tests that `p_adjusted` counts, Holm's family.

        Args:
            metric, against: as `tests` takes them.

        Raises:
            UnknownNameError: the comparison has no such metric or method.
        """
        from maskhooks.comparison import tables

        return tables.differences(self, metric, self.tests(metric, against=against))

    def table(self) -> pd.DataFrame:
        """Return a row for each method, and for each metric the columns mean, low and high; and seconds per example.

        With several sites the rows are by site and method.
        """
        from maskhooks.comparison import tables

        return tables.table(self)

    def rows(self) -> pd.DataFrame:
        """Return the value of each example: method, metric, site, depth, example, value."""
        from maskhooks.comparison import tables

        return tables.rows(self)

    def summary(self) -> pd.DataFrame:
        """Return a row for each row and metric, as `csv` writes it.

        Columns: method, site, depth, metric; mean, low, high, confidence; examples, undefined; better, unit; best,
        p_best (adjusted, of the difference from the best); seconds_per_example, fit_seconds.
        """
        from maskhooks.comparison import tables

        return tables.summary(self)

    def break_evens(self) -> list[BreakEven]:
        """Return after how many examples each trained method costs less than each other; see `break_even`."""
        found = []
        for label, timing in self.timings.items():
            for other, each in self.timings.items():
                random = score_label(self.explanations[other].provenance) == RANDOM
                if timing.fit_seconds is not None and each.fit_seconds is None and not random:
                    found.append(BreakEven(label, other, timing.fit_seconds, timing.seconds, each.seconds))
        return [one for one in found if not math.isnan(one.other_seconds)]

    def break_even(self) -> pd.DataFrame:
        """Return after how many examples a trained method costs less than each other one, its training included.

        Random scores and other trained methods are left out.

        Columns: method, other, fit_seconds, seconds, other_seconds, examples. `examples` is the training time over the
        difference of the times per example, rounded up; NaN where the trained method is no faster.
        """
        from maskhooks.comparison import tables

        return tables.break_even(self.break_evens())

    def agreement(self) -> list[tuple[Row, Row, float]]:
        """Return Kendall's tau-b of the scores of each two rows at one site, the mean over examples.

        NaN where it is not defined for any example, such as for equal scores. Agreement is not quality.
        """
        found = []
        for one, other in itertools.combinations(self.table_rows, 2):
            if one.site == other.site:
                first, second = (self._scores(row) for row in (one, other))
                (judged,) = judge(first, "kendall", others=[second], counts=self._counts)
                found.append((one, other, judged.mean))
        return found

    def curves(self, row: Row) -> Curves | None:
        """Return the perturbation curves of a row, for all examples; None if no metric has them.

        With several metrics of curves they are those of the metric that has the most of them.
        """
        metric = self.curve_metric
        if metric is None:
            return None
        parts = [
            one.curves
            for one in self.judged(row.method)
            if (one.metric, one.site, one.depth) == (metric, row.site, row.depth) and one.curves is not None
        ]
        names = ("shares", "highest_first", "lowest_first")
        return Curves(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @functools.cached_property
    def curve_metric(self) -> str | None:
        """The label of the metric whose curves are drawn; None if none has curves."""
        known: dict[str, int] = {}
        for one in self.judged(self.methods[0]):
            if one.curves is not None:
                lines = (one.curves.highest_first, one.curves.lowest_first)
                known[one.metric] = sum(int(np.isfinite(line).any()) for line in lines)
        return max(known, key=lambda label: known[label]) if known else None

    # Files

    @checked
    def save(self, folder: Folder) -> None:
        """Write everything into a folder; `compare(folder=...)` has done so already.

        Raises:
            ResumeError: the folder holds another comparison.
            StorageError: a file cannot be written.
        """
        self._store.save(Path(folder))

    @classmethod
    def load(
        cls, folder: str | Path, *, confidence: float = 0.95, counts: Callable[[str], bool] = not_special
    ) -> Comparison:
        """Read what `save` or `compare(folder=...)` wrote; no model is needed.

        Args:
            folder: the folder.
            confidence: the nominal coverage of intervals.
            counts: which labels count, for the agreement of methods; as `compare` took it.

        Raises:
            CorruptFileError: a file is missing or broken.
        """
        return cls(Store.load(Path(folder)), confidence=confidence, counts=counts)

    def to_parquet(self, path: str | Path) -> None:
        """Write `rows` as one Parquet file.

        Raises:
            StorageError: the file cannot be written.
        """
        with atomic_open(Path(path)) as file:
            self.rows().to_parquet(file)

    def csv(self, path: str | Path) -> None:
        """Write `summary` as CSV.

        Raises:
            StorageError: the file cannot be written.
        """
        _write(path, self.summary().to_csv(index=False, lineterminator="\n"))

    def latex(self, path: str | Path | None = None, *, digits: int = 3, intervals: bool = True) -> str:
        """Return a table for a paper, which needs the package booktabs; see `latex.latex`.

        Args:
            path: also write it to this file.
            digits: digits after the point.
            intervals: whether to print the interval of each mean.

        Raises:
            StorageError: the file cannot be written.
        """
        from maskhooks.comparison.latex import latex

        text = latex(self, digits=digits, intervals=intervals)
        if path is not None:
            _write(path, text)
        return text

    def page(self, path: str | Path | None = None, *, title: str = "", examples: int | Iterable[int] = 3) -> str:
        """Return a self-contained HTML page: scores with intervals, curves, times, agreement, examples side by side.

        Args:
            path: also write it to this file.
            title: the heading.
            examples: how many examples are shown side by side, from the first; or their indices.

        Raises:
            StorageError: the file cannot be written.
        """
        from maskhooks.comparison.comparison_page import comparison_page

        text = comparison_page(self, title=title, examples=examples)
        if path is not None:
            _write(path, text)
        return text

    # From the store

    @property
    def _seed(self) -> int:
        return int(self.settings["seed"])

    def _parts(self, label: str) -> list[Any]:
        found = [self._store.explained(label, number) for number in self._store.numbers]
        return [one for one in found if one is not None]

    def judged(self, label: str) -> list[Judged]:
        """Return what metrics say of each batch of a method."""
        return [one for number in self._store.numbers for one in self._store.judged(label, number) or ()]

    def _every(self) -> list[Judged]:
        return [one for label in self.methods for one in self.judged(label)]

    def _judgements(self, label: str) -> dict[str, list[Judgement]]:
        groups: dict[str, dict[tuple[str, int], list[Judged]]] = {metric: {} for metric in self.metrics}
        for one in self.judged(label):
            groups[one.metric].setdefault((one.site, one.depth), []).append(one)
        return {
            metric: [
                Judgement(
                    self.metrics[metric],
                    site,
                    depth,
                    np.concatenate([one.examples for one in parts]),
                    np.concatenate([one.values for one in parts]),
                )
                for (site, depth), parts in sorted(found.items(), key=lambda item: item[0][1])
            ]
            for metric, found in groups.items()
        }

    def _value(self, metric: str, row: Row) -> Judgement:
        found = self.judgements[row.method][metric]
        return next(one for one in found if (one.site, one.depth) == (row.site, row.depth))

    def _scores(self, row: Row) -> Explanation:
        return self.explanations[row.method].select(site=row.site, depth=row.depth, valid=None)

    def _interval(self, judged: Judgement) -> Interval:
        if _testable(judged.values):
            return interval(judged, confidence=self.confidence, seed=self._seed)
        known = int(judged.defined.sum())
        return Interval(judged.mean, math.nan, math.nan, self.confidence, "none", known, judged.undefined)

    def _timing(self, label: str) -> Timing:
        parts = [part for part in self._parts(label) if part.examples]
        warm = [part for part in parts if not part.first] or parts
        first = [part for part in parts if part.first]
        fits = [part.fit_seconds for part in parts if part.fit_seconds is not None]
        return Timing(
            _per_example(warm), _per_example(first), sum(part.examples for part in warm), fits[0] if fits else None
        )

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            raise UnknownNameError(
                f"no metric of this comparison is called {metric!r}. The metrics are {', '.join(self.metrics)}.",
                near=close_matches(metric, self.metrics),
            )


def _testable(values: Floats) -> bool:
    """Whether an interval is defined: two values at least, none infinite."""
    known = values[~np.isnan(values)]
    return len(known) > 1 and bool(np.isfinite(known).all())


def _per_example(parts: Sequence[Any]) -> float:
    examples = sum(part.examples for part in parts)
    return sum(part.seconds for part in parts) / examples if examples else math.nan


def _write(path: str | Path, text: str) -> None:
    with atomic_open(Path(path)) as file:
        file.write(text.encode("utf-8"))
