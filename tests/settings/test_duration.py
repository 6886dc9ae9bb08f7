"""Durations as users write them."""

from __future__ import annotations

import pytest

import maskhooks
from maskhooks.errors import SettingError
from maskhooks.settings.duration import Budget, seconds
from maskhooks.settings.schema import schema_of

FIT = schema_of(maskhooks.DiffMask.fit)["budget"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5 h", 5400), ("1d 2s", 86402), (12.5, 12.5), ("90", 90)],
)
def test_seconds(text: str | float, expected: float) -> None:
    assert seconds(FIT.check(text, "fit")) == expected
    assert Budget.of(text).seconds == expected


def test_a_budget_is_a_duration() -> None:
    budget = Budget(3.0, begun=1.0)
    assert Budget.of(FIT.check(budget, "fit")) is budget


@pytest.mark.parametrize("value", ["", "10 20", "ten minutes", "-5m", "0s", "5m3", 0, -1.0, float("inf"), True, ["5m"]])
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(SettingError, match="budget must be a duration such as 10m, 90s or 1h30m"):
        FIT.check(value, "fit")
