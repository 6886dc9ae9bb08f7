"""A metric as a stored comparison tells of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from maskhooks.errors import SettingError
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric


class KnownMetric(Metric):
    """A metric as the store tells of it: it says what values mean, and judges nothing."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.name, self.better, self.unit, self.source = (about[key] for key in ("name", "better", "unit", "source"))
        low, high = about["range"]
        self.range = (-math.inf if low is None else low, math.inf if high is None else high)
        self._settings = dict(about["settings"])

    def settings(self) -> dict[str, Any]:
        return self._settings

    def __call__(self, evidence: Evidence) -> Floats:
        raise SettingError(f"this metric was read from a comparison. Make {self.name!r} anew to judge by it")


def told(metric: Metric) -> dict[str, Any]:
    """Return what a store tells of a metric, JSON-serialisable."""
    settings = {name: _plain(value) for name, value in metric.settings().items()}
    about = {"name": metric.name, "better": metric.better, "unit": metric.unit, "source": metric.source}
    return {**about, "range": [end if math.isfinite(end) else None for end in metric.range], "settings": settings}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return type(value).__qualname__ if not callable(value) else getattr(value, "__qualname__", type(value).__qualname__)
