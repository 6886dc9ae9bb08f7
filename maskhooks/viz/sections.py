"""Sections: what a page tells above its examples, as plain values; the template draws and escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from maskhooks.viz.chart import Chart


@dataclass(frozen=True)
class Facts:
    """Names with what they are."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Bar:
    """A row of `Bars`.

    Args:
        name: what it is.
        length: in [0, 1]; 1 is all of the width.
        value: what is written beside the bar.
        note: what else is known, in small letters.
    """

    name: str
    length: float
    value: str
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars from left to right, one below the other.

    Args:
        rows: the first at the top.
        heads: what names and values are.
        caption: above them.
    """

    kind: ClassVar[str] = "bars"
    rows: Sequence[Bar]
    heads: tuple[str, str]
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of `Grid`: a score in [0, 1], None where there is none, and what its tooltip says."""

    score: float | None
    text: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of scores, shaded.

    Args:
        corner: what the columns are, in a word.
        columns: what the columns are called, each with a note in small letters.
        rows: what the rows are called, the first at the top.
        cells: `[row][column]`.
    """

    kind: ClassVar[str] = "grid"
    corner: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[str]
    cells: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ChartRow:
    """Charts side by side: their name, what they come to, and whether that is as it should be (None: not known)."""

    name: str
    note: str
    good: bool | None
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Charts:
    """Rows of small charts with the same axes.

    Args:
        columns: what each column shows.
        rows: the first at the top.
    """

    kind: ClassVar[str] = "charts"
    columns: Sequence[str]
    rows: Sequence[ChartRow]


Part: TypeAlias = Facts | Bars | Grid | Charts


@dataclass(frozen=True)
class Section:
    """A heading, a sentence below it that a newcomer understands, and pictures."""

    title: str
    text: str
    parts: Sequence[Part] = field(default=())
