"""Images: patch scores by row and column, one image for each depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskhooks.errors import SettingError
from maskhooks.viz.figure import Picture, Scale, figure_of
from maskhooks.viz.totals import WIDTHS, Totals, draw_totals


def images(
    scores: npt.ArrayLike,
    names: Sequence[str],
    *,
    title: str = "",
    label: str = "P(kept)",
    top: float = 1.0,
    columns: int = 4,
    totals: Totals | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw scores as images side by side, with row 0 at the top.

    Args:
        scores: `[image, row, column]`; NaN is grey, and red is below 0.
        names: names of the images.
        title: title of the figure.
        label: label of the colour bar.
        top: the score at which the colours end.
        columns: number of images side by side.
        totals: drawn to the right, a bar for each image, the first at the bottom; not on an `ax`.
        ax: Axes to draw on, for one image; None makes a figure.

    Returns:
        The figure.

    Raises:
        SettingError: several images for one `ax`.
    """
    values = np.ma.masked_invalid(np.asarray(scores, float))
    if ax is not None and len(names) > 1:
        raise SettingError(
            f"one Axes cannot hold {len(names)} images. Select a depth (explanation.select(depth=0)), or leave out ax"
        )
    across = min(columns, len(names))
    down = -(-len(names) // across)
    height = 2.2 * values.shape[1] / values.shape[2] + 0.3
    figure: Figure
    if ax is None:
        beside = () if totals is None else WIDTHS
        figure = Picture(figsize=(2.2 * across + 1.2 + sum(beside), height * down + 0.4), layout="constrained")
        grid = figure.add_gridspec(down, across + len(beside), width_ratios=[2.2] * across + [*beside])
        axes = [figure.add_subplot(grid[place // across, place % across]) for place in range(down * across)]
        if totals is not None:
            left, right = (figure.add_subplot(grid[:, across + index]) for index in range(2))
            draw_totals(totals, names, left, right, y="")
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    else:
        axes = [ax]
        figure = figure_of(ax)
    scale = Scale(scores, top)
    for part in axes:
        part.set_axis_off()
    for part, name, image in zip(axes, names, values, strict=False):
        shown = part.imshow(image, cmap=scale.colours, vmin=scale.bottom, vmax=top)
        part.set_title(name, fontsize="small", parse_math=False)
    bar = figure.colorbar(shown, ax=axes, label=label, ticks=scale.ticks, aspect=12, fraction=0.05)
    bar.outline.set_visible(False)
    return figure
