"""Sections: the content of a page above its examples, as plain values; the template draws and escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from maskhooks.viz.chart import Chart
from maskhooks.viz.lines import Lines
from maskhooks.viz.side_by_side import SideBySide


@dataclass(frozen=True)
class Table:
    """A table of names and values."""

    kind: ClassVar[str] = "table"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Bar:
    """A row of `Bars`.

    Args:
        name: shown before the bar.
        length: in [-1, 1]; 1 is the full width, and red is below 0.
        value: shown after the bar.
        note: shown in small type after the name.
    """

    name: str
    length: float
    value: str
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, one below the other.

    Args:
        rows: the first at the top.
        heads: the column headings of names and values.
        caption: above them.
    """

    kind: ClassVar[str] = "bars"
    rows: Sequence[Bar]
    heads: tuple[str, str]
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of `Grid`.

    Args:
        score: its shade, in [-1, 1], red below 0; None is an empty cell.
        text: the text of its tooltip.
        value: what is written in it; by default the score in per cent.
        note: written below it, in small type.
        strong: whether the value is bold.
    """

    score: float | None
    text: str = ""
    value: str = ""
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of shaded scores.

    Args:
        corner: one word for what the columns are.
        columns: names of the columns, each with a note in small type.
        rows: names of the rows, the first at the top.
        cells: `[row][column]`.
    """

    kind: ClassVar[str] = "grid"
    corner: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[str]
    cells: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ChartRow:
    """Charts side by side, with a name, a summary, and whether the result is good (None if unknown)."""

    name: str
    note: str
    good: bool | None
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Charts:
    """Rows of small charts with common axes.

    Args:
        columns: headings of the columns.
        rows: the first at the top.
    """

    kind: ClassVar[str] = "charts"
    columns: Sequence[str]
    rows: Sequence[ChartRow]


Part: TypeAlias = Table | Bars | Grid | Charts | Lines | SideBySide


@dataclass(frozen=True)
class Section:
    """A heading, a short explanation for newcomers, and pictures, side by side where there is room unless `wide`."""

    title: str
    text: str
    parts: Sequence[Part] = field(default=())
    wide: bool = False
