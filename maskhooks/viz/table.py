"""A small HTML table of coloured scores, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_CELL = "padding:1px 3px;white-space:pre;text-align:center"


def table(
    scores: npt.ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    caption: str = "",
    max_columns: int = 40,
    top: float = 1.0,
) -> str:
    """Return scores as shaded cells, the last row at the top; all text is escaped.

    Args:
        scores: `[row, column]`; red is below 0.
        rows: names of the rows.
        columns: names of the columns; only the first `max_columns` are shown.
        caption: above the table.
        max_columns: maximum number of columns.
        top: the score at which the shades end.
    """
    values = np.asarray(scores, float).reshape(len(rows), len(columns))
    head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in columns[:max_columns])
    head += f'<th style="{_CELL}">… {len(columns) - max_columns} more</th>' if len(columns) > max_columns else ""
    lines = [
        f'<tr><th style="{_CELL}">{html.escape(row)}</th>'
        + "".join(_cell(score, top) for score in line[:max_columns])
        + "</tr>"
        for row, line in zip(rows[::-1], values[::-1], strict=True)
    ]
    foot = f"<tr><th></th>{head}</tr>" if columns else ""
    return (
        f'<div style="overflow-x:auto"><p>{html.escape(caption)}</p>'
        f'<table style="border-collapse:collapse;font-size:85%">{"".join(lines)}{foot}</table></div>'
    )


def _cell(score: float, top: float) -> str:
    if np.isnan(score):
        return "<td></td>"
    colour = "33 113 181" if score >= 0 else "178 24 43"
    return f'<td title="{score:.3f}" style="background:rgb({colour} / {abs(score) / top:.3f});min-width:1em"></td>'
