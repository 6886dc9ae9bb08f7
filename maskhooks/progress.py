"""Progress on stderr: a bar on a terminal and in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")

_FIRST = 5.0  # seconds until the first line
_UNITS = {"y": 365 * 86400, "d": 86400, "h": 3600, "min": 60, "s": 1}


def duration(seconds: float) -> str:
    """Return a duration as text, in at most two units: `45 s`, `9 min`, `1 h 20 min`, `317 y`."""
    for (unit, length), (lower, step) in itertools.pairwise(_UNITS.items()):
        count, rest = divmod(round(seconds / step) * step, length)
        if count:
            return f"{count:,} {unit}" + (f" {rest // step} {lower}" if rest and unit != "y" else "")
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


class Bar:
    """Progress of some work on stderr, from when it is made to the end of its `with`.

    On a terminal and in a notebook it is a bar. Elsewhere, as in a file, a pipe or CI, it is plain lines: the first
    after 5 seconds, then one every 10 seconds in the first minute, every 30 seconds in the first ten minutes, and
    every minute from then on. Work that got a line also ends with one; shorter work prints nothing. Lines are written
    by updates, so where updates are rare, lines are too.

    The remaining time follows from the recent speed, since about half of the elapsed time.

    Args:
        name: what is being done.
        total: the count when all is done; None if unknown.
        done: the count done earlier, which the speed leaves out.
        speed: whether to show the speed, as is always done without a total.
        shown: whether to show anything.
    """

    def __init__(self, name: str, total: int | None, done: int = 0, *, speed: bool = False, shown: bool = True) -> None:
        self.name, self.total, self.done, self.speed, self.shown = name, total, done, speed, shown
        self._text, self._before = "", done
        console = Console(stderr=True)
        # With FORCE_COLOR rich takes every file for a terminal, and would write control codes to it.
        self._lines = not (console.is_jupyter or (console.is_interactive and console.file.isatty()))
        self._bar = Progress(
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
            console=console,
            disable=self._lines or not shown,
        )
        self._task = self._bar.add_task("", total=total, completed=done, name=name, left=_clock(None))
        self._begin = time.monotonic()
        self._due, self._printed = self._begin + _FIRST, False
        self._marks = deque([(self._begin, done)])  # times when the count grew: one at about half time, and later ones

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._printed:
            spent = time.monotonic() - self._begin
            self._print(self._count(), duration(spent), *self._per_second((self.done - self._before) / spent))

    def advance(self, count: int = 1) -> None:
        """Add to the count."""
        self.update(self.done + count)

    def update(
        self, done: int | None = None, text: str | None = None, left: float | None = None, total: int | None = None
    ) -> None:
        """Show new values.

        Args:
            done: the count; None leaves it.
            text: a description of the current state; None leaves it.
            left: the remaining time in seconds; None estimates it by the recent speed.
            total: a new estimate of the count when all is done; None leaves it.
        """
        self.total = self.total if total is None else total
        self.done, self._text = self.done if done is None else done, self._text if text is None else text
        if not self.shown:
            return
        now = time.monotonic()
        rate = self._rate(now)
        if left is None and rate and self.total is not None:
            left = max(0.0, (self.total - self.done) / rate)
        details = [*self._per_second(rate), *([self._text] if self._text else [])]
        if not self._lines:
            self._bar.update(
                self._task, total=self.total, completed=self.done, description=", ".join(details), left=_clock(left)
            )
        elif now >= self._due and (self.done != self.total or left):
            spent = now - self._begin
            percent = f" ({100 * self.done // self.total} %)" if self.total else ""
            about = [] if left is None else [f"about {rough(left)} left"]
            self._print(self._count() + percent, f"{duration(spent)} elapsed", *about, *details)
            self._due, self._printed = now + (10 if spent < 60 else 30 if spent < 600 else 60), True

    def _rate(self, now: float) -> float:
        """Return the count per second since about half of the elapsed time, or since the latest growth before."""
        marks, spent = self._marks, now - self._begin
        if self.done > marks[-1][1] and spent > 1.1 * (marks[-1][0] - self._begin):
            marks.append((now, self.done))
        while len(marks) > 1 and marks[1][0] - self._begin <= spent / 2 and marks[1][1] < self.done:
            marks.popleft()
        since, there = marks[0]
        return (self.done - there) / (now - since) if now > since else 0.0

    def _per_second(self, rate: float) -> list[str]:
        shown = rate and (self.speed or self.total is None)
        return [f"{rate:,.0f} per second" if rate >= 10 else f"{rate:.2g} per second"] if shown else []

    def _count(self) -> str:
        return f"{self.name}: {self.done:,}" + ("" if self.total is None else f" of {self.total:,}")

    def _print(self, *parts: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed file does not end the work
            self._bar.console.file.write(", ".join(parts) + "\n")  # at once, so that no other output comes between
            self._bar.console.file.flush()


class _Lasting(Console):
    def on_broken_pipe(self) -> None:
        """Go on: rich would end the program."""


def say(text: str) -> None:
    """Print a paragraph on stderr."""
    with contextlib.suppress(OSError, ValueError):  # as with a bar
        console = _Lasting(stderr=True, highlight=False)
        console.print(text, markup=False, soft_wrap=not console.file.isatty())


def length(items: Iterable[Any]) -> int | None:
    """Return the number of items; None if they have none, as a DataLoader over an IterableDataset."""
    try:
        return len(items)  # type: ignore[arg-type] # what has no length raises
    except TypeError:
        return None


def track(items: Iterable[T], name: str, *, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Yield the items and show progress; give `total` if they have no length."""
    known = length(items)
    with Bar(name, total if known is None else known, shown=shown) as bar:
        for item in items:
            yield item
            bar.advance()


@contextlib.contextmanager
def counter(name: str, total: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show progress with a speed; yield the function that adds to the count.

    Args:
        total: None if unknown.
        done: the count done earlier, which the speed leaves out.
    """
    with Bar(name, total, done, speed=True, shown=shown) as bar:
        yield bar.advance


def _clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


def rough(seconds: float) -> str:
    """Return an estimated duration as text, without digits that nobody can know."""
    step = 60.0 if seconds >= 120 else 5.0
    return duration(step * max(1, round(seconds / step)))
