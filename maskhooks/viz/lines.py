"""Lines: several curves in one picture, each with a band, as the points that the page's template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

COLOURS = 8  # in the page's style; further lines are dashed
WIDE, HIGH = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 18, 10, 34
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: in the legend.
        x: in [0, 1], a share.
        y: one for each; NaN is left out.
        low, high: the ends of the band; NaN draws none.
    """

    name: str
    x: npt.ArrayLike
    y: npt.ArrayLike
    low: npt.ArrayLike
    high: npt.ArrayLike


@dataclass(frozen=True)
class Drawn:
    """A curve in picture units: its points and its band in SVG's format, and a mark with a tooltip at each point."""

    name: str
    colour: int
    dashed: bool
    points: str
    band: str
    marks: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Lines:
    """A picture of several curves with a legend; `WIDE` by `HIGH`.

    Attributes:
        title: above the picture.
        x, y: what the axes are.
        lines: the curves.
        across, up: the place and the text of each tick.
    """

    kind: ClassVar[str] = "lines"
    wide: ClassVar[int] = WIDE
    high: ClassVar[int] = HIGH
    title: str
    x: str
    y: str
    lines: Sequence[Drawn]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]


def lines(title: str, curves: Sequence[Line], *, x: str, y: str, beside: Sequence[Line] = ()) -> Lines:
    """Return a picture of curves over a share, from 0 to 100 %; the y axis spans the curves and their bands.

    Args:
        title: above the picture.
        curves: the first has the first colour.
        x, y: what the axes are.
        beside: the curves of a picture beside this one, which the y axis spans too.
    """
    shown = [*curves, *beside]
    every = np.concatenate([np.r_[np.asarray(one.y), np.asarray(one.low), np.asarray(one.high)] for one in shown])
    every = every[np.isfinite(every)]
    least, most = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
    step = next((size for size in _STEPS if (most - least) / size <= 5), _STEPS[-1])
    bottom, top = math.floor(least / step) * step, math.ceil(most / step) * step
    top = top if top > bottom else bottom + step
    digits = 2 if step < 0.1 else 1

    def across(share: float) -> float:
        return round(_LEFT + (WIDE - _LEFT - _RIGHT) * share, 1)

    def up(value: float) -> float:
        return round(_TOP + (HIGH - _TOP - _BOTTOM) * (top - value) / (top - bottom), 1)

    def path(at: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> str:
        return " ".join(f"{across(one):g},{up(value):g}" for one, value in zip(at, values, strict=True))

    drawn = []
    for number, curve in enumerate(curves):
        at, values, low, high = (np.asarray(part, np.float64) for part in (curve.x, curve.y, curve.low, curve.high))
        there, banded = np.isfinite(values), np.isfinite(low) & np.isfinite(high)
        marks = [
            (across(one), up(value), f"{curve.name}: {value:.3f}{_ends(*ends)} at {one:.0%}")
            for one, value, ends in zip(at[there], values[there], np.stack([low, high], 1)[there], strict=True)
        ]
        band = f"{path(at[banded], high[banded])} {path(at[banded][::-1], low[banded][::-1])}".strip()
        drawn.append(
            Drawn(curve.name, number % COLOURS, number // COLOURS % 2 == 1, path(at[there], values[there]), band, marks)
        )
    shares = [(across(share), f"{share:.0%}") for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    ticks = [bottom + step * index for index in range(round((top - bottom) / step) + 1)]
    return Lines(title, x, y, drawn, shares, [(up(tick), f"{tick:.{digits}f}") for tick in ticks])


def _ends(low: float, high: float) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f" [{low:.3f}, {high:.3f}]"
