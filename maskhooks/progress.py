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


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} a second")


@contextlib.contextmanager
def counting(name: str, total: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with a count, a speed and the remaining time; gives the function that counts on.

    Args:
        total: None where it is not known.
        done: what was there before, which the speed leaves out.
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
