"""Totals: a bar for each layer, and what is lost between a layer and the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maskhooks.viz.amount import amount
from maskhooks.viz.figure import COLOURS, SIGNED, Picture, figure_of, visible

WIDTHS = (1.9, 1.9)  # of the two Axes, in inches
_ROOM = 1.45  # how far an axis goes on past its longest bar, for the number behind it


@dataclass(frozen=True)
class Totals:
    """What the layers of a model have in all.

    Args:
        values: `[layer]`, lowest first; NaN has no bar.
        lost: `[layer - 1]`, what a layer has more than the next; negative where the next has more.
        unit: of both.
        errors, lost_errors: half-lengths of error bars; None draws none.
    """

    values: npt.ArrayLike
    lost: npt.ArrayLike
    unit: str
    errors: npt.ArrayLike | None = None
    lost_errors: npt.ArrayLike | None = None


def totals(found: Totals, names: Sequence[str], *, title: str = "", y: str = "depth") -> Figure:
    """Draw totals and losses side by side, with the lowest layer at the bottom.

    Args:
        found: what to draw.
        names: names of the layers.
        title: title of the figure.
        y: label of the y axis.

    Returns:
        The figure.
    """
    figure = Picture(figsize=(2 * sum(WIDTHS), 0.3 * len(names) + 1.1), layout="constrained")
    axes = figure.subplots(1, 2)
    draw_totals(found, names, *axes, y=y)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    return figure_of(axes[0])


def draw_totals(found: Totals, names: Sequence[str] | None, left: Axes, right: Axes, *, y: str = "depth") -> None:
    """Draw totals on one Axes and losses on another, layer l at heights l to l + 1, as in a heatmap.

    Args:
        names: names of the layers; None if they stand beside these Axes.
    """
    values, lost = np.asarray(found.values, float), np.asarray(found.lost, float)
    blue, red = (matplotlib.colormaps[name](tone) for name, tone in ((COLOURS, 0.7), (SIGNED, 0.1)))
    _bars(left, np.arange(len(values)) + 0.5, values, found.errors, [blue] * len(values), 0.7)
    signs = [red if one < 0 else blue for one in lost]
    _bars(right, np.arange(len(values) - 1) + 1.0, lost, found.lost_errors, signs, 0.45)
    gained = " (red: gained)" if (lost < 0).any() else ""
    for axes, heading, x in ((left, "all positions", ""), (right, "lost on the way up", gained)):
        axes.set_title(heading, loc="left", fontsize="small")
        axes.set_xlabel(found.unit + x)
        axes.set_ylim(0, len(values))
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.axvline(0, color="0.25", linewidth=0.8)
    if names is not None:
        left.set_yticks(np.arange(len(names)) + 0.5, [visible(name, 40) for name in names], parse_math=False)
        left.set_ylabel(y)


def _bars(
    axes: Axes,
    heights: npt.NDArray[np.floating],
    values: npt.NDArray[np.float64],
    errors: npt.ArrayLike | None,
    colours: Sequence[Any],
    thickness: float,
) -> None:
    spans = np.zeros(len(values)) if errors is None else np.nan_to_num(np.asarray(errors, float))
    lengths = np.nan_to_num(values)
    axes.barh(heights, lengths, thickness, color=colours)
    if spans.any():
        style: dict[str, Any] = {"fmt": "none", "ecolor": "0.25", "elinewidth": 1, "capsize": 2}
        axes.errorbar(lengths, heights, xerr=spans, **style)
    low, high = min((lengths - spans).min(initial=0), 0), max((lengths + spans).max(initial=0), 0)
    room = (_ROOM - 1) * ((high - low) or 1)
    axes.set_xlim(low - room * (low < 0), high + room * (high > 0 or low == 0))
    for height, value, span in zip(heights, values, spans, strict=True):
        if np.isnan(value):
            continue
        shift, side = (3, "left") if value >= 0 else (-3, "right")
        end = value + (span if value >= 0 else -span)
        axes.annotate(
            amount(float(value)),
            (end, float(height)),
            xytext=(shift, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize="x-small",
        )
