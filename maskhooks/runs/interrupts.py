"""Interrupts: signals that ask a training run to stop: Ctrl-C, or a cluster's notice before it takes a machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within the `with`, records the first SIGINT or SIGTERM in `asked` and stops at once on the next one.

    Ignored signals stay ignored. Outside the main thread nothing changes, since Python does not allow it there.

    Args:
        passed_on: whether child processes get the signal too; the second one kills them.
    """

    asked: int = 0

    def __init__(self, *, passed_on: bool = False) -> None:
        self.passed_on = passed_on
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, number
        if self.passed_on:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL if again else number)
        elif multiprocessing.parent_process() is not None:
            return  # a terminal signals both processes, and the parent ends this one
        if again:
            raise as_exception(number, "interrupted a second time")


def as_exception(number: int, message: str) -> BaseException:
    """Return what Python raises for a signal: KeyboardInterrupt for Ctrl-C, SystemExit(128 + number) for others."""
    return KeyboardInterrupt(message) if number == signal.SIGINT else SystemExit(128 + number)
