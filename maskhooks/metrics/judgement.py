"""Judgements: what metrics say of an explanation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.metrics.evidence import Evidence, Floats, Truth, not_special
from maskhooks.metrics.explaining import ExplainedBy
from maskhooks.metrics.metric import METRICS, Metric, MetricSetting, Need
from maskhooks.model.hooked import Hooked
from maskhooks.plugins.registry import registry

if TYPE_CHECKING:
    import pandas as pd

_GIVEN = {
    "hooked": "the wrapped model and the batches that were explained, hooked=... and batches=...",
    "truth": "what each example needs, truth=...",
    "others": "other explanations of the same examples, others=[...]",
    "explainer": "the explainer that made the explanation, or a function that makes one, explainer=...",
}


@dataclass(frozen=True, eq=False, repr=False)
class Judgement:
    """What one metric says of an explanation at one masked site and depth.

    Attributes:
        metric: the metric, with its settings.
        site: the masked site's address.
        depth: the depth that was read.
        examples: the indices of the examples.
        values: the value of each; NaN where it is not defined.
    """

    metric: Metric
    site: str
    depth: int
    examples: npt.NDArray[np.int64]
    values: Floats

    @property
    def defined(self) -> npt.NDArray[np.bool_]:
        """For which examples the value is defined."""
        return ~np.isnan(self.values)

    @property
    def undefined(self) -> int:
        """The number of examples without a value."""
        return int((~self.defined).sum())

    @property
    def mean(self) -> float:
        """The mean over examples with a value; NaN if none has one. `undefined` says how many have none."""
        return float(self.values[self.defined].mean()) if self.defined.any() else float("nan")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.metric.settings().items())
        without = f", undefined for {self.undefined}" if self.undefined else ""
        return (
            f"Judgement({self.metric.name}({settings}) at {self.site}, depth {self.depth}: mean {self.mean:.4g} over "
            f"{int(self.defined.sum())} examples{without}; {self.metric.better} is better)"
        )


def judge(
    explanation: Explanation,
    metrics: MetricSetting | Sequence[MetricSetting],
    *,
    hooked: Hooked | None = None,
    batches: Iterable[Any] = (),
    truth: Truth | None = None,
    others: Sequence[Explanation] = (),
    explainer: ExplainedBy | None = None,
    counts: Callable[[str], bool] = not_special,
    start_index: int = 0,
) -> list[Judgement]:
    """Judge an explanation, of any explainer, by one or more metrics.

    Args:
        explanation: its scores.
        metrics: metrics by name, as a mapping of name and settings, or as objects.
        hooked: the wrapped model that was explained.
        batches: the batches that were explained, in the same order. They may hold more examples than the explanation.
        truth: what each example's prediction needs: `truth[example][position]`, by index, a weight from 0 for each
            position, such as 1 where it is needed and 0 elsewhere. An example with several minimal sets has a row for
            each, `truth[example][set][position]`.
        others: other explanations of the same examples, such as with other seeds.
        explainer: the explainer that made the explanation, for metrics that explain again; or a function from a
            `Hooked` that makes it, and fits it if it must be.
        counts: which labels count. Default: all but special tokens, such as `[CLS]`. Padding never counts. Positions
            that do not count are never removed.
        start_index: the index of the first example of the first batch.

    Returns:
        For each masked site and depth, in order of depth, a judgement by each metric, in the order given.

    Raises:
        UnknownNameError: no metric has this name; near names are listed.
        SettingError: a setting of a metric is wrong, a metric lacks what it needs, or the explanation does not fit: it
            is of another model, explainer or other batches, has scores that are NaN, or an example without a position
            that counts.
    """
    listed = [metrics] if isinstance(metrics, (str, Mapping, Metric)) else list(metrics)
    made = [registry.make(METRICS, one) for one in listed]
    loaded = list(batches)
    given: dict[Need, bool] = {
        "hooked": hooked is not None and bool(loaded),
        "truth": truth is not None,
        "others": bool(others),
        "explainer": explainer is not None,
    }
    check_needs(made, given)
    return [
        Judgement(metric, evidence.site, evidence.depth, evidence.examples, _values(metric, evidence))
        for evidence in Evidence.of(
            explanation,
            hooked=hooked,
            batches=loaded,
            start_index=start_index,
            truth=truth,
            others=others,
            explainer=explainer,
            counts=counts,
        )
        for metric in made
    ]


def check_needs(metrics: Iterable[Metric], given: Mapping[Need, bool]) -> None:
    """Raise SettingError if a metric needs what is not given."""
    for metric in metrics:
        for need in sorted(metric.needs):
            if not given[need]:
                raise SettingError(f"the metric {metric.name!r} needs {_GIVEN[need]}")


def table(judgements: Iterable[Judgement]) -> pd.DataFrame:
    """Return a row for each judgement: metric, site, depth, mean, examples with a value, undefined, direction, unit."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "metric": one.metric.name,
                "site": one.site,
                "depth": one.depth,
                "mean": one.mean,
                "defined": int(one.defined.sum()),
                "undefined": one.undefined,
                "better": one.metric.better,
                "unit": one.metric.unit,
            }
            for one in judgements
        ]
    )


def _values(metric: Metric, evidence: Evidence) -> Floats:
    values = np.asarray(metric(evidence), dtype=np.float64)
    if values.shape != evidence.examples.shape:
        raise SettingError(
            f"the metric {metric.name!r} returned values of shape {list(values.shape)} for {len(evidence.examples)} "
            "examples. Return one number per example"
        )
    return values
