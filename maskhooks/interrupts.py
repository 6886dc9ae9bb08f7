"""Signals that ask a training run to end: Ctrl-C, and the notice that a cluster gives before it takes a machine."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While the `with` lasts, the first SIGINT or SIGTERM is noted in `asked`, and the next one ends at once.

    Signals that are ignored stay ignored. Outside the main thread nothing is changed: Python does not allow it there.
    """

    asked: int = 0

    def __init__(self) -> None:
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
        if self.asked:
            raise as_exception(number, "interrupted a second time")
        self.asked = number


def as_exception(number: int, message: str) -> BaseException:
    """What Python raises for a signal: KeyboardInterrupt for Ctrl-C, SystemExit(128 + number) for others."""
    if number == signal.SIGINT:
        return KeyboardInterrupt(message)
    ended = SystemExit(128 + number)
    ended.add_note(message) if hasattr(ended, "add_note") else None
    return ended
