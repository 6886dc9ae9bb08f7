"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


def bar(name: str, total: int | None) -> tuple[Progress, TaskID]:
    """Return an unstarted bar with count, elapsed and remaining time, and a description that may change."""
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
    """Yield the items with a progress bar; give `total` if they have no length."""
    if not shown:
        yield from items
        return
    progress, task = bar(name, len(items) if isinstance(items, Sized) else total)
    with progress:
        for item in items:
            yield item
            progress.advance(task)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} per second")


@contextlib.contextmanager
def counter(name: str, total: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar with a count, a speed and the remaining time; yield the function that advances it.

    Args:
        total: None if unknown.
        done: the count done earlier, which the speed leaves out.
    """
    if not shown:
        yield lambda count: None
        return
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda count: progress.advance(task, count)
