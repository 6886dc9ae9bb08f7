"""Figures without pyplot: a figure that notebooks show, panels for long rows, literal labels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

COLOURS, SIGNED = "Blues", "RdBu"
_SHOWN = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


class Scale:
    """The colours of scores, from 0 to an end; or if a score is below 0, from its opposite, through white at 0.

    Args:
        scores: all that are shown; NaN has no colour.
        top: the score at which the colours end.

    Attributes:
        bottom: the score at which they begin, 0 or -top.
    """

    def __init__(self, scores: npt.ArrayLike, top: float) -> None:
        self.top = top
        self.bottom = -top if bool((np.nan_to_num(np.asarray(scores, float)) < 0).any()) else 0.0

    @property
    def colours(self) -> Colormap:
        name = SIGNED if self.bottom else COLOURS
        return matplotlib.colormaps[name].with_extremes(bad="0.88")

    @property
    def ticks(self) -> list[float]:
        """Three ticks."""
        return [self.bottom, (self.bottom + self.top) / 2, self.top]


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def panels(
    count: int, cell: float, max_width: float, height: float, ax: Axes | None, beside: Sequence[float] = ()
) -> tuple[list[tuple[Axes, slice]], list[Axes]]:
    """Split `count` columns evenly over stacked Axes; return each with its columns, and Axes beside the first.

    Args:
        count: the total number of columns.
        cell: width of a column, in inches.
        max_width: maximum width of a panel, in inches.
        height: height of a panel, in inches.
        ax: draw everything here instead.
        beside: widths of more Axes to the right of the first panel, in inches; with `ax` there are none.
    """
    if ax is not None:
        return [(ax, slice(0, count))], []
    number = max(math.ceil(count * cell / max_width), 1)
    each = max(math.ceil(count / number), 1)
    width = max(each * cell, 3.2)
    figure = Picture(figsize=(width + 1.6 + sum(beside), number * height + 0.3), layout="constrained")
    axes = figure.subplots(number, 1 + len(beside), squeeze=False, width_ratios=[width, *beside])
    for unused in axes[1:, 1:].flat:
        unused.remove()
    return [(axes[index, 0], slice(index * each, min((index + 1) * each, count))) for index in range(number)], [
        *axes[0, 1:]
    ]


def figure_of(ax: Axes) -> Figure:
    """Return the root figure of Axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # None only for Axes removed from their figure
    return figure


def name_columns(ax: Axes, labels: Sequence[str], at: float = 0.0) -> None:
    """Label the ticks at 0, 1, ... plus `at`; short labels stay horizontal, and dollars do not start mathematics."""
    texts = [visible(label) for label in labels]
    short = max((len(text) for text in texts), default=0) <= 3 or sum(map(len, texts)) <= 2 * len(texts)
    ax.set_xticks([index + at for index in range(len(texts))])
    if short:
        ax.set_xticklabels(texts, parse_math=False)
    else:
        ax.set_xticklabels(texts, parse_math=False, rotation=55, ha="right", rotation_mode="anchor")


def visible(label: str, max_length: int = 24) -> str:
    """Return a label with line breaks, tabs and blank labels made visible, cut to `max_length` characters."""
    text = label.translate(_SHOWN) if label.strip() else label.translate(_SHOWN).replace(" ", "␣")
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
