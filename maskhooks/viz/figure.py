"""Figures without pyplot: a figure that notebooks show, long rows in panels, labels taken literally."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = "Blues"
_SHOWN = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def panels(count: int, cell: float, wide: float, height: float, ax: Axes | None) -> list[tuple[Axes, slice]]:
    """Axes below each other that share out `count` columns evenly, with the columns of each.

    Args:
        count: columns in all.
        cell: width of a column, in inches.
        wide: width of a panel at most, in inches.
        height: height of a panel, in inches.
        ax: draw everything here instead.
    """
    if ax is not None:
        return [(ax, slice(0, count))]
    number = max(math.ceil(count * cell / wide), 1)
    each = max(math.ceil(count / number), 1)
    figure = Picture(figsize=(max(each * cell, 3.2) + 1.6, number * height + 0.3), layout="constrained")
    axes = figure.subplots(number, 1, squeeze=False)[:, 0]
    return [(axes[index], slice(index * each, min((index + 1) * each, count))) for index in range(number)]


def figure_of(ax: Axes) -> Figure:
    """The whole figure that Axes stand in."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # only Axes removed from their figure have none
    return figure


def name_columns(ax: Axes, labels: Sequence[str], at: float = 0.0) -> None:
    """Ticks `at` right of 0, 1, ...; labels upright where short, without mathematics between dollars."""
    texts = [visible(label) for label in labels]
    short = max((len(text) for text in texts), default=0) <= 3 or sum(map(len, texts)) <= 2 * len(texts)
    ax.set_xticks([index + at for index in range(len(texts))])
    if short:
        ax.set_xticklabels(texts, parse_math=False)
    else:
        ax.set_xticklabels(texts, parse_math=False, rotation=55, ha="right", rotation_mode="anchor")


def visible(label: str, most: int = 24) -> str:
    """A label with line breaks and lone blanks made visible, and shortened to `most` letters."""
    text = label.translate(_SHOWN) if label.strip() else label.translate(_SHOWN).replace(" ", "␣")
    return text if len(text) <= most else text[: most - 1] + "…"
