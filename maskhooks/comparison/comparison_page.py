"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from maskhooks.comparison.comparison import Comparison
from maskhooks.comparison.results import Cell as Result
from maskhooks.comparison.results import Row
from maskhooks.errors import SettingError
from maskhooks.explanations.layers import Layers
from maskhooks.explanations.pictures import example as pictured
from maskhooks.explanations.score_labels import score_label
from maskhooks.metrics.evidence import Floats
from maskhooks.metrics.intervals import means
from maskhooks.progress import duration
from maskhooks.viz.lines import Line, lines
from maskhooks.viz.page import page
from maskhooks.viz.sections import Bar, Bars, Cell, Grid, Part, Section, Table
from maskhooks.viz.side_by_side import Side, SideBySide

_CURVES = {
    "highest_first": "Highest scores removed first: the faster it falls, the better",
    "lowest_first": "Lowest scores removed first: the longer it stays, the better",
}
_ARROWS = {"higher": "↑", "lower": "↓"}


def comparison_page(comparison: Comparison, *, title: str = "", examples: int | Iterable[int] = 3) -> str:
    """Return the page; see `Comparison.page`."""
    chosen = comparison.examples[:examples] if isinstance(examples, int) else list(examples)
    missing = sorted(set(chosen) - set(comparison.examples))
    if missing:
        raise SettingError(f"there is no example {missing[0]}. Give indices of examples that were compared")
    sections = [
        _scores(comparison),
        *_curves(comparison),
        _times(comparison),
        *_agreement(comparison),
        _side_by_side(comparison, chosen),
    ]
    return page(
        [],
        [],
        title=title or "Which explanation is to be believed?",
        note=_note(comparison),
        provenance=comparison.settings,
        sections=[one for one in sections if one.parts],
    )


def _note(comparison: Comparison) -> str:
    sites = comparison.sites
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites, {sites[0]} to {sites[-1]}"
    return (
        f"{len(comparison.methods)} methods on {len(comparison.examples)} examples of a "
        f"{comparison.settings['model']['name']}, at {where}."
    )


def _scores(comparison: Comparison) -> Section:
    tests = len(comparison.tests(next(iter(comparison.metrics))))
    text = (
        f"Means over examples, and below them {100 * comparison.confidence:g} % intervals (bootstrap, BCa). Higher is "
        "better where the arrow points up. The darker, the better in its column. Bold is the best mean; ≈ does not "
        "differ from it at the 5 % level by a paired permutation test, "
        f"adjusted by Holm's rule for all {tests} tests of a metric. No metric alone says which "
        "explanation is right, and erasure depends on what replaces a position."
    )
    parts: list[Part] = []
    columns = [(name, f"{about.unit} {_ARROWS[about.better]}") for name, about in comparison.metrics.items()]
    results = [comparison.cells(metric) for metric in comparison.metrics]
    for site in comparison.sites:
        numbers = [number for number, row in enumerate(comparison.table_rows) if row.site == site]
        shades = [_shades(comparison, [column[number] for number in numbers]) for column in results]
        cells = [
            [_cell(column[number], shade[at]) for column, shade in zip(results, shades, strict=True)]
            for at, number in enumerate(numbers)
        ]
        corner = "Method" if len(comparison.sites) == 1 else site
        parts.append(Grid(corner, columns, [comparison.name(comparison.table_rows[n]) for n in numbers], cells))
    return Section("Scores", text, parts, wide=True)


def _shades(comparison: Comparison, results: Sequence[Result]) -> list[float]:
    """Return where each mean is between the worst, 0, and the best, 1."""
    sign = 1 if results and comparison.metrics[results[0].metric].better == "higher" else -1
    values = np.array([sign * one.interval.mean for one in results], np.float64)
    finite = values[np.isfinite(values)]
    if not len(finite) or np.ptp(finite) == 0:
        return [0.5] * len(results)
    return [float(one) for one in np.nan_to_num((values - finite.min()) / np.ptp(finite), neginf=0, posinf=1)]


def _cell(result: Result, shade: float) -> Cell:
    one = result.interval
    if math.isnan(one.mean):
        return Cell(None)
    same = not result.best and not result.worse and not math.isnan(result.p_best)
    note = "" if math.isnan(one.low) else f"{one.low:.3f} to {one.high:.3f}"
    told = [f"over {one.examples} examples" + (f", not defined for {one.undefined}" if one.undefined else "")]
    if not result.best and not math.isnan(result.p_best):
        told.append(f"difference from the best: p = {result.p_best:.4f}")
    return Cell(shade, "; ".join(told), f"{one.mean:.3f}{' ≈' if same else ''}", note, result.best)


def _curves(comparison: Comparison) -> list[Section]:
    metric = comparison.curve_metric
    if metric is None:
        return []
    about = comparison.metrics[metric].settings()
    how = {
        "baseline": f"it becomes the baseline {about.get('baseline')!r}",
        "mask": "it becomes the mask token",
        "delete": "it is left out",
    }.get(str(about.get("operator")), "")
    parts: list[Part] = []
    for site in comparison.sites:
        rows = [row for row in comparison.table_rows if row.site == site]
        found = {name: [line for row in rows for line in _line(comparison, row, name)] for name in _CURVES}
        every = [line for here in found.values() for line in here]
        for name, here in found.items():
            if here:
                heading = _CURVES[name] if len(comparison.sites) == 1 else f"{site}. {_CURVES[name]}"
                parts.append(lines(heading, here, x="share of positions removed", y="probability", beside=every))
    text = (
        "The probability of the predicted class while positions are removed in the order of their scores, the mean "
        f"over examples with {100 * comparison.confidence:g} % intervals."
        + (f" Where a position is removed, {how}." if how else "")
    )
    return [Section("Curves", text, parts)]


def _line(comparison: Comparison, row: Row, name: str) -> list[Line]:
    """Return one curve of a row, if it was computed."""
    curves = comparison.curves(row)
    values: Floats = np.empty(0) if curves is None else getattr(curves, name)
    if not np.isfinite(values).any():
        return []
    mean, low, high = means(values, confidence=comparison.confidence, seed=int(comparison.settings["seed"]))
    return [Line(comparison.name(row), np.linspace(0, 1, len(mean)), mean, low, high)]


def _times(comparison: Comparison) -> Section:
    timings = {label: one for label, one in comparison.timings.items() if not math.isnan(one.seconds)}
    most = max((one.seconds for one in timings.values()), default=1.0) or 1.0
    bars = [
        Bar(
            label,
            one.seconds / most,
            duration(one.seconds),
            "" if one.fit_seconds is None else f"after {duration(one.fit_seconds)} of training",
        )
        for label, one in timings.items()
    ]
    text = (
        "Explaining alone, in batches as they were given, without metrics and without training. The first batch of "
        "each method is left out where there are others."
    )
    parts: list[Part] = [Bars(bars, ("Method", "per example"))] if bars else []
    told = [str(one) for one in comparison.break_evens()]
    if told:
        parts.append(
            Table(
                [(f"break-even {number}" if len(told) > 1 else "break-even", one) for number, one in enumerate(told, 1)]
            )
        )
    return Section("Time", text, parts)


def _agreement(comparison: Comparison) -> list[Section]:
    found = comparison.agreement()
    if not found:
        return []
    parts: list[Part] = []
    for site in comparison.sites:
        rows = [row for row in comparison.table_rows if row.site == site]
        taus = {frozenset((one, other)): tau for one, other, tau in found}
        cells = [[_tau(1.0 if one == other else taus[frozenset((one, other))]) for other in rows] for one in rows]
        corner = "Method" if len(comparison.sites) == 1 else site
        names = [comparison.name(row) for row in rows]
        parts.append(Grid(corner, [(name, "") for name in names], names, cells))
    text = (
        "Kendall's tau-b of the scores of two methods in an example, the mean over examples: 1 is the same order of "
        "positions, 0 no relation. Methods may agree and be wrong."
    )
    return [Section("Agreement", text, parts, wide=True)]


def _tau(tau: float) -> Cell:
    return Cell(None) if math.isnan(tau) else Cell(tau, f"tau-b {tau:.3f}", f"{tau:.2f}")


def _side_by_side(comparison: Comparison, examples: Sequence[int]) -> Section:
    rows = [row for row in comparison.table_rows if row.site == comparison.sites[0]]
    parts: list[Part] = []
    for number in examples:
        sides: list[Side] = []
        facts: dict[str, str] = {}
        for row in rows:
            chosen = comparison.explanations[row.method].select(site=row.site, depth=row.depth)
            if number not in chosen["example"]:
                continue
            one = chosen.select(example=number)
            layers = Layers.shown(one.columns, one.sites, one.provenance)
            metadata = one.metadata.get(number, {})
            shown = pictured(layers, np.arange(len(one)), number, metadata, (), None)
            facts = facts or metadata
            sides.append(Side.of(comparison.name(row), score_label(one.provenance), shown))
        parts.append(SideBySide(f"Example {number}", list(facts.items()), sides))
    where = f" at {comparison.sites[0]}" if len(comparison.sites) > 1 else ""
    text = (
        f"The same examples by each method{where}. Each method's shades end at its largest score in the example, so "
        "compare their order, not their depth; red is below 0."
    )
    return Section("Side by side", text, parts)
