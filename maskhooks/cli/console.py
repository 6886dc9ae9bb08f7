"""Printing: results go to stdout, everything else to stderr; errors and warnings take one line."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskhooks.errors import MaskhooksError, MaskhooksWarning
from maskhooks.sites.text_table import Rows

_WIDE = 400  # columns without a terminal: files and pipes get whole lines
FAILED = 2
_NUMBER = re.compile(r"[-\d.]*%?|inf|nan")


def say(text: str, style: str = "", *, wrap: bool = True) -> None:
    """Print a paragraph on stdout, literally.

    Args:
        wrap: whether to break lines between words at the terminal's width; False for text to copy, such as a command.
    """
    console = _console()
    console.print(Text(text, style), soft_wrap=not (wrap and console.is_terminal))


def say_table(rows: Rows, title: str = "", alarm: Callable[[Mapping[str, str]], bool] | None = None) -> None:
    """Print rows with the same keys as a table on stdout, without columns that have no text.

    Args:
        alarm: whether to print a row in red.
    """
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    names = [name for name in (rows[0] if rows else {}) if any(row[name] for row in rows)]
    for name in names:
        numbers = all(_NUMBER.fullmatch(row[name]) for row in rows)
        table.add_column(
            name.replace(" ", "\n"), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold"
        )
    for row in rows:
        red = "red" if alarm is not None and alarm(row) else ""
        table.add_row(*(Text(row[name]) for name in names), style=red)
    _console().print(table)


@contextlib.contextmanager
def reporting(debug: bool = False) -> Iterator[None]:
    """Print a maskhooks error in red and exit, print maskhooks warnings in yellow, and drop other warnings.

    Args:
        debug: whether to let errors through with their traceback, and show every warning as Python does.

    Raises:
        typer.Exit: with code 2 after a maskhooks error.
    """
    if debug:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MaskhooksWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except MaskhooksError as error:
            tell("error", str(error), "red")
            raise typer.Exit(FAILED) from error


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> Any:
    tell("warning", str(message), "yellow")


def tell(kind: str, text: str, style: str) -> None:
    """Print a line on stderr, such as `error: ...`."""
    one_line = " ".join(text.split())
    _console(stderr=True).print(Text(f"{kind}: {one_line}", style), soft_wrap=True)


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console
