"""Progress with a clock of our own: when lines are written and what they say, and the bar of a terminal."""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from maskhooks.progress import Bar, counter, duration, say, track


class Clock:
    """Shows the seconds that it was told to wait."""

    def __init__(self) -> None:
        self.now = 1000.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """What it shows, without colours and moves of the cursor."""
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("maskhooks.progress.time", SimpleNamespace(monotonic=lambda: made.now))
    return made


@pytest.fixture
def lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """Returns the lines on stderr since the last call; each is whole."""

    def read() -> list[str]:
        out, err = capsys.readouterr()
        assert not out
        assert not err or err.endswith("\n")
        assert err.replace("\n", "").isprintable()
        return err.splitlines()

    return read


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal; pytest puts its own stderr back between a fixture and its test."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.0123, "0.012 s"),
        (5.0, "5 s"),
        (45.4, "45 s"),
        (59.6, "1 min"),
        (92.0, "1 min 32 s"),
        (540.0, "9 min"),
        (3599.7, "1 h"),
        (4800.0, "1 h 20 min"),
        (86399.0, "1 d"),
        (1e6, "11 d 14 h"),
        (1e10, "317 y"),
        (1e12, "31,709 y"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_and_the_last_one(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Bar("training", 2400) as bar:
        clock.wait(92)
        bar.update(340, "divergence 0.081 kept 0.41")
        assert lines() == [
            "training: 340 of 2,400 (14 %), 1 min 32 s elapsed, about 9 min left, divergence 0.081 kept 0.41"
        ]
        clock.wait(559)
        bar.update(2400)
        assert lines() == []
    assert lines() == ["training: 2,400 of 2,400, 10 min 51 s"]


def test_lines_become_rarer(clock: Clock, lines: Callable[[], list[str]]) -> None:
    written: list[int] = []
    with Bar("training", 1000) as bar:
        for second in range(1, 901):
            clock.wait(1)
            bar.advance()
            if lines():
                written.append(second)
    assert written == [5, 15, 25, 35, 45, 55, 65, *range(95, 606, 30), 665, 725, 785, 845]
    assert lines() == ["training: 900 of 1,000, 15 min"]


def test_short_work_is_silent(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Bar("training", 4) as bar:
        for _ in range(4):
            clock.wait(1.2)
            bar.advance()
    assert list(track(range(3), "reading")) == [0, 1, 2]
    assert lines() == []


def test_the_time_left_follows_from_the_recent_speed(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Bar("training", 3000) as bar:
        for step in range(2100):
            clock.wait(1.0 if step < 100 else 0.1)
            bar.advance()
        lines()
        clock.wait(30)
        bar.update(2400)
        (line,) = lines()
        assert ", about 1 min left" in line  # 600 at 10 a second; the mean is 7.3
        for _ in range(60):
            clock.wait(10)
            bar.advance()
        assert lines()[-1].endswith(", about 1 h 30 min left")  # 540 at one in 10 seconds


def test_the_time_left_without_growth(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Bar("searching", 2) as bar:
        clock.wait(59)
        bar.update(0, "sets of 3")
        assert lines() == ["searching: 0 of 2 (0 %), 59 s elapsed, sets of 3"]
        clock.wait(1)
        bar.update(1)
        clock.wait(70)
        bar.update(1)
        assert lines() == ["searching: 1 of 2 (50 %), 2 min 10 s elapsed, about 2 min left, sets of 3"]


def test_a_given_time_left(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with Bar("training", 10) as bar:
        for left, text in ((4800.0, "1 h 20 min"), (93.0, "1 min 35 s"), (0.5, "5 s")):
            clock.wait(60)
            bar.update(1, left=left)
            (line,) = lines()
            assert line.endswith(f" elapsed, about {text} left")


def test_an_unknown_total(clock: Clock, lines: Callable[[], list[str]]) -> None:
    for _ in track(iter(range(7)), "reading"):
        clock.wait(2)
    assert lines() == ["reading: 3, 6 s elapsed, 0.5 per second", "reading: 7, 14 s, 0.5 per second"]


def test_a_counter_says_its_speed(clock: Clock, lines: Callable[[], list[str]]) -> None:
    with counter("explaining", 100_000, 40_000) as advance:
        for _ in range(60):
            clock.wait(1)
            advance(1000)
    first, *_, last = lines()
    assert first == "explaining: 45,000 of 100,000 (45 %), 5 s elapsed, about 55 s left, 1,000 per second"
    assert last == "explaining: 100,000 of 100,000, 1 min, 1,000 per second"


@pytest.mark.parametrize("make", [terminal, None])
def test_hidden_progress(
    clock: Clock,
    lines: Callable[[], list[str]],
    make: Callable[[pytest.MonkeyPatch], Terminal] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = make(monkeypatch) if make else io.StringIO()
    for _ in track(range(3), "reading", shown=False):
        clock.wait(60)
    with counter("explaining", None, shown=False) as advance, Bar("training", 3, shown=False) as bar:
        clock.wait(60)
        advance(1)
        bar.update(1, "kept 0.41")
    assert shown.getvalue() == ""
    assert lines() == []


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = terminal(monkeypatch)
    with Bar("fitting {a} [b]", 2400) as bar:
        clock.wait(92)
        bar.update(340, "kept [0.41]", left=540.0)
    assert re.search(r"fitting \{a\} \[b\] [━╸]+ +340/2400 kept \[0\.41\] 0:00:\d\d 0:09:00\n", file.text())
    assert "elapsed" not in file.text()
    with counter("explaining", None) as advance:
        clock.wait(2)
        advance(2408)
    assert re.search(r"explaining [━╸]+ +2408/\? 1,204 per second 0:00:\d\d -:--:--\n", file.text())


def test_a_notebook_gets_no_lines(
    clock: Clock, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskhooks.progress.Console", functools.partial(Console, force_jupyter=True))
    bar = Bar("training", 3)  # not entered: its bar would need a notebook
    clock.wait(6)
    bar.advance()
    assert lines() == []


def test_a_failure_closes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    file = terminal(monkeypatch)

    def fail() -> None:
        with Bar("training", 3) as bar:
            bar.advance()
            assert sys.stderr is not file  # so that other output goes above the bar
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sys.stderr is file
    assert "1/3" in file.text()
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back


def test_a_failure_is_told_where_it_was(clock: Clock, lines: Callable[[], list[str]]) -> None:
    def fail() -> None:
        for number in track(range(3), "reading"):
            clock.wait(6)
            if number == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert lines()[1:] == ["reading: 2 of 3, 18 s"]


def test_colours_do_not_make_a_file_a_terminal(
    clock: Clock, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bar("training", 3) as bar:
        clock.wait(6)
        bar.advance()
    assert len(lines()) == 2


def test_each_line_is_written_at_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class File(io.StringIO):
        def write(self, text: str) -> int:
            calls.append(text)
            return len(text)

        def flush(self) -> None:
            calls.append("flush")

    monkeypatch.setattr(sys, "stderr", File())
    with Bar("training", 3) as bar:
        clock.wait(6)
        bar.advance()
        assert calls == ["training: 1 of 3 (33 %), 6 s elapsed, about 10 s left\n", "flush"]


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError("I/O operation on closed file"), None])
def test_what_cannot_be_said_does_not_end_the_work(
    error: type[Exception] | Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            assert error is not None
            raise error

    monkeypatch.setattr(sys, "stderr", None if error is None else Broken())
    say("Training takes about 5 min.")


def test_a_full_disk_does_not_end_the_work(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with Bar("training", 3) as bar:
        clock.wait(6)
        bar.advance()
    assert len(tried) == 2
