"""Groups: a horizontal bar for each group, as in figure 4 of De Cao et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskhooks.viz.figure import COLOURS, Picture, figure_of, visible


def groups(
    names: Sequence[str],
    values: npt.ArrayLike,
    errors: npt.ArrayLike | None = None,
    counts: Sequence[int] | None = None,
    *,
    x: str = "",
    title: str = "",
    max_groups: int = 30,
    ax: Axes | None = None,
) -> Figure:
    """Draw a bar for each group, the first at the top.

    Args:
        names: names of the groups.
        values: lengths of the bars.
        errors: half-lengths of the error bars; NaN draws none.
        counts: number of members of each group, shown beside its name.
        x: label of the x axis.
        title: title of the figure.
        max_groups: maximum number of groups; a line with their number replaces those in the middle.
        ax: Axes to draw on; None makes a figure.

    Returns:
        The figure.
    """
    lengths = np.asarray(values, float)
    spans = np.zeros(len(lengths)) if errors is None else np.nan_to_num(np.asarray(errors, float))
    shown = [*range(len(names))]
    if len(names) > max_groups:
        shown[max_groups - max_groups // 2 : len(names) - max_groups // 2] = []
    left_out = len(names) - len(shown)
    rows = np.arange(len(shown)) + (np.arange(len(shown)) >= max_groups - max_groups // 2) * (left_out > 0)
    if ax is None:
        ax = Picture(figsize=(6.4, 0.24 * (len(shown) + (left_out > 0)) + 1.0), layout="constrained").subplots()
    ax.barh(rows, lengths[shown], 0.75, color=matplotlib.colormaps[COLOURS](0.7))
    drawn = spans[shown] > 0
    if drawn.any():
        ax.errorbar(
            lengths[shown][drawn],
            rows[drawn],
            xerr=spans[shown][drawn],
            fmt="none",
            ecolor="0.25",
            elinewidth=1,
            capsize=2,
        )
    texts = [visible(names[index]) + (f"  ({counts[index]:,})" if counts is not None else "") for index in shown]
    ticks = list(rows)
    if left_out:
        ticks.append(max_groups - max_groups // 2)
        texts.append(f"… {left_out} more …")
    ax.set_yticks(ticks)
    ax.set_yticklabels(texts, parse_math=False)
    ax.set_ylim(len(shown) + (left_out > 0) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.set_xlabel(x)
    ax.set_title(title, loc="left", fontsize="medium", parse_math=False, wrap=True)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return figure_of(ax)
