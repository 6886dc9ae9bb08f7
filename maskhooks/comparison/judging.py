"""Judging: what the metrics of a comparison say of the scores of one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from maskhooks.errors import SettingError, UnknownDistributionError
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.layers import Layers
from maskhooks.masks.baselines import BASELINES, Baseline
from maskhooks.metrics.erasure import CurveMetric, Curves, ErasureMetric
from maskhooks.metrics.evidence import Evidence, Floats, Truth
from maskhooks.metrics.judgement import check_needs, judge
from maskhooks.metrics.metric import METRICS, Metric, MetricSetting, Need
from maskhooks.metrics.removal import replacing
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import predicted_probability
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import clean_pass
from maskhooks.plugins.registry import registry

#: Which depths are judged where the masks of one site are read from several.
Depths = Literal["last", "all"]

_CLASSES = ("comprehensiveness", "sufficiency", "area-between", "divergence")
_ANY_OUTPUT = ("divergence",)
_TRUE = ("auroc", "average-precision")


def default_metrics(hooked: Hooked, batch: Any, truth: Truth | None) -> list[str]:
    """Return metrics by erasure that fit the model's outputs, and some of a known truth if there is one."""
    clean = clean_pass(hooked, move(batch, device_of(hooked.model)), [])
    try:
        predicted_probability(clean.outputs, clean.outputs)
        found = [*_CLASSES]
    except UnknownDistributionError:
        found = [*_ANY_OUTPUT]
    return found if truth is None else [*found, *_TRUE]


def labelled(metrics: Sequence[MetricSetting]) -> dict[str, Metric]:
    """Return metrics by label: the name, with the settings that tell metrics of one name apart.

    Raises:
        UnknownNameError: no metric has this name.
        SettingError: there is no metric, two are the same, or a setting is wrong.
    """
    made = [registry.make(METRICS, one) for one in metrics]
    if not made:
        raise SettingError("there is no metric to judge by. Give names, such as metrics=['comprehensiveness']")
    found: dict[str, Metric] = {}
    for metric in made:
        same = [other.settings() for other in made if other.name == metric.name]
        own = metric.settings()
        apart = [f"{name}={value}" for name, value in own.items() if any(one.get(name) != value for one in same)]
        label = metric.name + (f" ({', '.join(apart)})" if apart else "")
        if label in found:
            raise SettingError(f"the metric {label} is given twice. Leave one out")
        found[label] = metric
    return found


@dataclass(frozen=True, eq=False)
class Judged:
    """What a metric says of some examples at one masked site and depth.

    Attributes:
        metric: the label of the metric.
        site, depth: where.
        examples: their indices.
        values: the value of each; NaN where it is not defined.
        curves: the perturbation curves behind the values, if the metric has any.
    """

    metric: str
    site: str
    depth: int
    examples: npt.NDArray[np.int64]
    values: Floats
    curves: Curves | None = None


class Judging:
    """Judges scores batch by batch.

    A baseline that takes statistics of the data takes those of all batches.

    Args:
        hooked: the wrapped model.
        metrics: by label.
        batches: all of them.
        truth, counts: as `judge` takes them.
        methods: the number of methods; a metric of agreement compares each with all others.
        depths: which depths are judged where the masks of one site are read from several: the "last", or "all".

    Raises:
        SettingError: a metric lacks what it needs.
    """

    def __init__(
        self,
        hooked: Hooked,
        metrics: Mapping[str, Metric],
        batches: Sequence[Any],
        truth: Truth | None,
        counts: Callable[[str], bool],
        methods: int,
        depths: Depths,
    ) -> None:
        given: dict[Need, bool] = {"hooked": True, "truth": truth is not None, "others": methods > 1, "explainer": True}
        check_needs(metrics.values(), given)
        self.hooked, self.metrics, self.batches = hooked, metrics, batches
        self.truth, self.counts, self.depths = truth, counts, depths
        self.compares = any("others" in metric.needs for metric in metrics.values())
        self._gathering = {label for label, metric in metrics.items() if _gathers(metric)}
        self._gathered: dict[tuple[str, str], Metric] = {}

    def __call__(
        self,
        explanation: Explanation,
        explainer: Explainer | None,
        batch: Any,
        first: int,
        others: Sequence[Explanation],
    ) -> list[Judged]:
        """Return what each metric says of the scores of a batch.

        Args:
            explanation: the scores.
            explainer: what made them; None for scores that were there already.
            first: the index of the batch's first example.
            others: the scores of the other methods.
        """
        if self.depths == "last":
            explanation, *others = (_deepest(one) for one in (explanation, *others))
        if not self._gathering:
            return self._judged(explanation, self.metrics, explainer, batch, first, others)
        found: list[Judged] = []
        for site in explanation.sites:
            at_site = {label: self._ready(label, site) for label in self.metrics}
            part = explanation if len(explanation.sites) == 1 else explanation.select(site=site, valid=None)
            found += self._judged(part, at_site, explainer, batch, first, others)
        return found

    def _judged(
        self,
        explanation: Explanation,
        metrics: Mapping[str, Metric],
        explainer: Explainer | None,
        batch: Any,
        first: int,
        others: Sequence[Explanation],
    ) -> list[Judged]:
        traced = {label: _Traced(one) if isinstance(one, CurveMetric) else one for label, one in metrics.items()}
        judgements = judge(
            explanation,
            list(traced.values()),
            hooked=self.hooked,
            batches=[batch],
            truth=self.truth,
            others=others if self.compares else (),
            explainer=explainer,
            counts=self.counts,
            start_index=first,
        )
        labels = {id(metric): label for label, metric in traced.items()}
        found = []
        for one in judgements:
            curves = one.metric.curves[one.site, one.depth] if isinstance(one.metric, _Traced) else None
            found.append(Judged(labels[id(one.metric)], one.site, one.depth, one.examples, one.values, curves))
        return found

    def _ready(self, label: str, site: str) -> Metric:
        """Return the metric for a site, its baseline with the statistics of all batches there."""
        metric = self.metrics[label]
        if label not in self._gathering:
            return metric
        if (label, site) not in self._gathered:
            assert isinstance(metric, ErasureMetric)
            ready = copy.copy(metric)
            ready.baseline = replacing(self.hooked, self.hooked.required_sites(site)[0], metric.removing, self.batches)
            self._gathered[label, site] = ready
        return self._gathered[label, site]


class _Traced(Metric):
    """A metric of curves that keeps the curves of what it judges."""

    def __init__(self, metric: CurveMetric) -> None:
        self.metric, self.needs, self.name = metric, metric.needs, metric.name
        self.curves: dict[tuple[str, int], Curves] = {}

    def __call__(self, evidence: Evidence) -> Floats:
        values, self.curves[evidence.site, evidence.depth] = self.metric.traced(evidence)
        return values


def _deepest(explanation: Explanation) -> Explanation:
    """Return the scores of each site that were read at its last depth."""
    pairs = Layers(explanation.columns, explanation.sites).pairs
    last = dict(pairs)  # pairs are in order of depth
    if len(last) == len(pairs):
        return explanation
    chosen = [explanation.select(site=site, depth=depth, valid=None) for site, depth in last.items()]
    return Explanation.concat(chosen)


def _gathers(metric: Metric) -> bool:
    """Whether the metric's baseline takes statistics of the data."""
    if not isinstance(metric, ErasureMetric) or metric.operator != "baseline":
        return False
    baseline = registry.make(BASELINES, metric.baseline)
    return not baseline.started and type(baseline).fit is not Baseline.fit
