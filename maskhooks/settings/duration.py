"""Durations, such as "10m", "1h30m" or a number of seconds, and budgets of time."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER = r"\d+(?:\.\d+)?"
_PART = rf"({_NUMBER})\s*([smhd])\s*"


@dataclass(frozen=True)
class Budget:
    """The time that a run may take.

    Args:
        seconds: how long.
        begun: when it began, by `time.monotonic`; None for when the run begins.
        checks_after: how much time to keep for what follows the run, in units of one comparison of checkpoints.
    """

    seconds: float
    begun: float | None = None
    checks_after: float = 0.0

    @classmethod
    def of(cls, value: float | str | Budget, begun: float | None = None) -> Budget:
        """Return the budget for what a user writes: a duration that begins at `begun`, or a `Budget`."""
        return value if isinstance(value, Budget) else cls(seconds(value), begun)


class _Duration:
    words = "a duration such as 10m, 90s or 1h30m, or a number of seconds"

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return re.fullmatch(rf"\s*(({_PART})+|{_NUMBER}\s*)", value) is not None and seconds(value) > 0
        if isinstance(value, Budget):
            return value.seconds > 0
        return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf


#: A duration above zero, as text or as a number of seconds.
Duration = Annotated[float | str | Budget, _Duration()]


def seconds(value: float | str) -> float:
    """Return a duration in seconds."""
    with contextlib.suppress(ValueError):
        return float(value)
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, str(value)))
