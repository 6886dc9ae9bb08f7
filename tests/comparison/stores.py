"""Comparisons with given values, of explanations with given scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskhooks import Comparison
from maskhooks.comparison.judging import Judged
from maskhooks.comparison.known_metric import told
from maskhooks.comparison.store import Explained, Store
from maskhooks.metrics.erasure import Comprehensiveness, Sufficiency
from tests.metrics import small

METRICS = {"comprehensiveness": Comprehensiveness(), "sufficiency": Sufficiency()}
Values = Mapping[str, Sequence[float]]


def settings(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "model": {"name": "Classifier", "fingerprint": "f"},
        "methods": {label: {"name": label} for label in labels},
        "metrics": {name: told(metric) for name, metric in METRICS.items()},
        "batches": ["b"],
        "truth": None,
        "counts": "not_special",
        "seed": 0,
    }


def store(values: Values, seconds: Mapping[str, tuple[float, float | None]] | None = None, **more: Values) -> Store:
    """A store with one batch.

    Args:
        values: of comprehensiveness, by method.
        seconds: for an example, and of the training, by method.
        more: the values of other metrics; by default those of comprehensiveness.
    """
    made = Store(settings(list(values)))
    wrapped, count = small.hooked(), len(next(iter(values.values())))
    lengths = (5,) * count
    inputs = small.batch(lengths)
    for number, label in enumerate(values):
        explanation = small.explanation(wrapped, inputs, small.scores(lengths, seed=number))
        each, fit = (seconds or {}).get(label, (1.0, None))
        made.add_explained(label, 0, Explained(explanation, each * count, True, fit))
        judged = [
            Judged(metric, small.SITE, 0, np.arange(count), np.array(more.get(metric, values)[label], np.float64))
            for metric in METRICS
        ]
        made.add_judged(label, 0, judged)
    return made


def comparison(values: Values, *args: Any, **more: Any) -> Comparison:
    return Comparison(store(values, *args, **more))


def saved(values: Values, folder: Path) -> Comparison:
    found = comparison(values)
    found.save(folder)
    return found
