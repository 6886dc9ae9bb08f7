"""Heatmap: scores of layers by positions, as in figures 6 and 8 of De Cao et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskhooks.viz.figure import Scale, figure_of, name_columns, panels, visible
from maskhooks.viz.totals import WIDTHS, Totals, draw_totals


def heatmap(
    scores: npt.ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    x: str = "",
    y: str = "depth",
    label: str = "P(kept)",
    top: float = 1.0,
    max_width: float = 10.8,
    totals: Totals | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw scores as colours, with the first row at the bottom.

    Args:
        scores: `[row, column]`; NaN is grey, and red is below 0.
        rows: names of the rows.
        columns: names of the columns.
        title: title of the figure.
        x: label of the x axis.
        y: label of the y axis.
        label: label of the colour bar.
        top: the score at which the colours end.
        max_width: maximum width of a panel, in inches; more columns continue in a panel below.
        totals: drawn to the right, a bar beside each row; not on an `ax`, which has no room for it.
        ax: Axes to draw on, in one panel; None makes a figure.

    Returns:
        The figure.
    """
    values = np.ma.masked_invalid(np.asarray(scores, float).reshape(len(rows), len(columns)))
    beside = () if totals is None else WIDTHS
    parts, more = panels(len(columns), 0.3, max_width, 0.24 * len(rows) + 1.0, ax, beside)
    scale = Scale(scores, top)
    shades: dict[str, Any] = {"cmap": scale.colours, "vmin": scale.bottom, "vmax": top}
    for part, chosen in parts:
        mesh = part.pcolormesh(values[:, chosen], edgecolors="white", linewidth=0.6, **shades)
        part.set_xlim(0, parts[0][1].stop)
        name_columns(part, columns[chosen], at=0.5)
        step = -(-len(rows) // 26)
        part.set_yticks(
            np.arange(0, len(rows), step) + 0.5, [visible(row, 40) for row in rows[::step]], parse_math=False
        )
        part.set_ylabel(y)
        part.tick_params(length=0)
        part.spines[:].set_visible(False)
    first, last = parts[0][0], parts[-1][0]
    first.set_title(title, loc="left", fontsize="medium", parse_math=False, wrap=True)
    last.set_xlabel(x)
    figure = figure_of(first)
    bar = figure.colorbar(
        mesh,
        ax=[part for part, _ in parts],
        label=label,
        ticks=scale.ticks,
        aspect=12,
        shrink=1 / len(parts),
        anchor=(0, 1),
        panchor=False,
    )
    bar.outline.set_visible(False)
    if totals is not None and more:
        draw_totals(totals, None, *more)
    return figure
