"""Chart: one quantity over steps, as the points that the page's template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WIDE, HIGH = 320, 104
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 10, 16
_RAW, _SMOOTH = 300, 150  # maximum number of points; the picture has too few pixel columns to show more

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A single value, such as one on validation data: a filled or hollow circle at `x, y` with a tooltip."""

    x: float
    y: float
    text: str
    filled: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart in picture units; the picture is `WIDE` by `HIGH`.

    Attributes:
        title: alternative text.
        raw: points of the faint line, in SVG's format.
        smooth: points of the line above it.
        ticks: height and text of each grid line.
        marks: single values.
        hline: height of a dashed line.
        vline: x position of a vertical line.
        last: the last step.
    """

    title: str
    raw: str
    smooth: str
    ticks: Sequence[tuple[float, str]]
    marks: Sequence[Point]
    hline: float | None
    vline: float | None
    last: int


def chart(
    title: str,
    steps: npt.ArrayLike,
    values: npt.ArrayLike,
    *,
    last: int,
    top: float,
    marks: Sequence[Point] = (),
    hline: float | None = None,
    vline: float | None = None,
    percent: bool = False,
) -> Chart:
    """Return a chart of values over steps, with their running mean.

    Args:
        title: alternative text.
        steps: in order.
        values: one for each step.
        last: the end of the x axis.
        top: the end of the y axis; larger values are clipped to it.
        marks: single values; their `x` is a step.
        hline: a value marked by a dashed line.
        vline: a step marked by a vertical line.
        percent: whether values are fractions, shown in per cent.
    """
    x, y = np.asarray(steps, np.float64), np.minimum(np.asarray(values, np.float64), 1e3 * top)  # keep means finite

    def across(step: float) -> float:
        return round(_LEFT + (WIDE - _LEFT - _RIGHT) * step / max(last, 1), 1)

    def up(value: float) -> float:
        return round(HIGH - _BOTTOM - (HIGH - _TOP - _BOTTOM) * min(value / top, 1.0), 1)

    def points(chosen: tuple[Floats, Floats]) -> str:
        found = [f"{across(step):g},{up(value):g}" for step, value in zip(*chosen, strict=True)]
        return " ".join(found * 2 if len(found) == 1 else found)  # a single point draws no line

    return Chart(
        title,
        points(extremes(x, y, _RAW)),
        points(thinned(x, running_mean(y), _SMOOTH)),
        [(up(tick), f"{tick:.0%}" if percent else f"{tick:g}") for tick in ticks(top)],
        [Point(across(mark.x), up(mark.y), mark.text, mark.filled) for mark in marks],
        None if hline is None else up(hline),
        None if vline is None else across(vline),
        last,
    )


def running_mean(values: Floats, share: float = 0.05) -> Floats:
    """Return a centred running mean over a share of all values; the window shrinks at the ends."""
    width = max(round(len(values) * share), 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    means: Floats = (sums[high] - sums[low]) / (high - low)
    return means


def thinned(x: Floats, y: Floats, max_points: int) -> tuple[Floats, Floats]:
    """Return at most `max_points` points, evenly spaced, including the first and the last."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(max_points, len(x))).round().astype(int))
    return x[chosen], y[chosen]


def extremes(x: Floats, y: Floats, max_points: int) -> tuple[Floats, Floats]:
    """Return at most `max_points` points that preserve peaks: the lowest and the highest of each stretch."""
    if len(x) <= max_points:
        return x, y
    stretches = np.array_split(np.arange(len(x)), max_points // 2)
    chosen = [sorted({int(part[y[part].argmin()]), int(part[y[part].argmax()])}) for part in stretches]
    places = [place for pair in chosen for place in pair]
    return x[places], y[places]


def ticks(top: float) -> list[float]:
    """Return two to four round values from 0, none above `top`."""
    unit = 10.0 ** math.floor(math.log10(top))
    step = next(size * unit for size in (0.5, 1, 2, 5) if top / (size * unit) < 4)
    return [round(step * index, 12) for index in range(int(top / step * (1 + 1e-9)) + 1)]
