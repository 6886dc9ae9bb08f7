"""An amount as text, for pictures and pages."""

from __future__ import annotations


def amount(value: float) -> str:
    """Return a number with three digits, or with all digits before the point: `0.001`, `0.124`, `12.4`, `-1,240`."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 or value == 0 else f"{value:.3f}"
