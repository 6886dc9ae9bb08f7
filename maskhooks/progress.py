"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def bar(name: str, total: int | None) -> tuple[Progress, TaskID]:
    """An unstarted bar with count, elapsed and remaining time, and a description that may change."""
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    return progress, progress.add_task("", total=total)


def track(items: Iterable[T], name: str, *, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """The items, with a bar while they are gone through; `total` where they have no length of their own."""
    if not shown:
        yield from items
        return
    progress, task = bar(name, len(items) if isinstance(items, Sized) else total)
    with progress:
        for item in items:
            yield item
            progress.advance(task)
