"""Bars: the score of each position, groups side by side, as in figure 3 of De Cao et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from maskhooks.viz.figure import COLOURS, Scale, figure_of, name_columns, panels, visible


def bars(
    scores: npt.ArrayLike,
    groups: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    x: str = "",
    label: str = "P(kept)",
    top: float = 1.0,
    colours: Sequence[str] | None = None,
    max_width: float = 10.8,
    ax: Axes | None = None,
) -> Figure:
    """Draw a bar for each column and group.

    Args:
        scores: `[group, column]`; NaN has no bar.
        groups: names of the groups, such as depths or methods; one group gets no legend.
        columns: names of the columns.
        title: title of the figure.
        x: label of the x axis.
        label: label of the y axis.
        top: the score at which the y axis ends.
        colours: one for each group; the default goes from light to dark.
        max_width: maximum width of a panel, in inches; more columns continue in a panel below.
        ax: Axes to draw on, in one panel; None makes a figure.

    Returns:
        The figure.
    """
    values = np.asarray(scores, float).reshape(len(groups), len(columns))
    tones = np.linspace(0.4, 0.95, len(groups)) if len(groups) > 1 else [0.75]
    shades = colours or [to_hex(matplotlib.colormaps[COLOURS](tone)) for tone in tones]
    parts, _ = panels(len(columns), 0.22 + 0.08 * len(groups), max_width, 2.2, ax)
    width, scale = 0.8 / len(groups), Scale(scores, top)
    for part, chosen in parts:
        names = columns[chosen]
        for index, (group, shade) in enumerate(zip(groups, shades, strict=True)):
            places = np.arange(len(names)) + (index - (len(groups) - 1) / 2) * width
            part.bar(places, values[index, chosen], width, color=shade, label=visible(group, 40))
        name_columns(part, names)
        part.set_xlim(-0.6, parts[0][1].stop - 0.4)
        part.set_ylim(1.02 * scale.bottom, 1.02 * top)
        part.set_yticks(scale.ticks)
        part.grid(axis="y", color="0.9")
        part.set_axisbelow(True)
        part.set_ylabel(label)
        part.tick_params(length=0)
        part.spines[["top", "right", "left"]].set_visible(False)
    first, last = parts[0][0], parts[-1][0]
    first.set_title(title, loc="left", fontsize="medium", parse_math=False, wrap=True)
    last.set_xlabel(x)
    if len(groups) > 1:
        first.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize="small")
    return figure_of(first)
