"""The base class of metrics: how good an explanation is, as one number per example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.plugins.kind import declare
from maskhooks.settings.schema import checked, schema_of

Need = Literal["hooked", "truth", "others", "explainer"]


class Metric(ABC):
    """Judges the scores of one masked site and depth: one number per example, NaN where it is not defined.

    The settings are the keyword arguments of the class; each is kept in an attribute of the same name.

    Args:
        absolute: whether scores are compared by their absolute values; otherwise by value, so that an attribution below
            0 ranks last.

    Attributes:
        name: the name in lists and results.
        better: whether "higher" or "lower" values are better.
        range: the lowest and the highest value.
        unit: what the values are measured in.
        source: where the definition is from.
        needs: which arguments of `judge` it needs: "hooked" (with the batches), "truth", "others" or
            "explainer".
    """

    name: str
    better: Literal["higher", "lower"]
    range: tuple[float, float]
    unit: str
    source: str
    needs: frozenset[Need] = frozenset()

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Check the arguments of each metric's own `__init__` against its signature."""
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            type.__setattr__(cls, "__init__", checked(vars(cls)["__init__"]))

    def __init__(self, *, absolute: bool = False) -> None:
        self.absolute = absolute

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {name: getattr(self, name) for name in schema_of(type(self))}

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Floats:
        """Return the value of each of `evidence.examples`; NaN where it is not defined.

        Args:
            evidence: has what the metric `needs`.
        """


METRICS = declare("metric", Metric)
#: How `judge` takes a metric: its name, a mapping of its name and settings, or a `Metric`.
MetricSetting = Annotated[str | Mapping[str, Any] | Metric, METRICS]
