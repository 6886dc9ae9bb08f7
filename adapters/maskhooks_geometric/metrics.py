"""PyTorch Geometric's metrics of explanations, for scores of edges by any explainer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Gt, Le

from maskhooks.errors import MissingExtraError, ModelError, SettingError
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.model.task import device_of, move
from maskhooks.settings.types import Fraction, Seed

if TYPE_CHECKING:
    from torch_geometric.explain import Explainer as GeometricExplainer
    from torch_geometric.explain import Explanation as GeometricExplanation

_ONE = "Give one graph in a batch, or a torch_geometric.data.Batch of several, without sampled neighbours"


class GeometricMetric(Metric):
    """A metric of `torch_geometric.explain.metric`, for each graph by itself.

    The edges that the explanation keeps are a hard mask, by which PyTorch Geometric multiplies the messages of all
    layers. Edges that are masked still count in degrees, and added self-loops stay, so that this is not the graph
    without them. Classes are those that the model predicts.

    Args:
        share: the share of a graph's edges that are kept, those of the highest scores, rounded up; None for those that
            the explanation keeps.
        absolute: as `Metric` takes it.
        seed: the random seed, for the order of equal scores.
    """

    needs = frozenset({"hooked"})
    range = (0.0, 1.0)
    unit = "share of graphs"

    def __init__(
        self, *, share: Annotated[float, Gt(0), Le(1)] | None = None, absolute: bool = False, seed: Seed = 0
    ) -> None:
        super().__init__(absolute=absolute)
        self.share, self.seed = share, seed

    def __call__(self, evidence: Evidence) -> Floats:
        found = np.full(len(evidence.examples), np.nan)
        for number, graph in _graphs(evidence):
            at = np.flatnonzero(evidence.examples == number)
            if len(at):
                found[at] = self.measured(*self._explained(evidence, int(at[0]), graph))
        return found

    @abstractmethod
    def measured(self, explainer: GeometricExplainer, explanation: GeometricExplanation) -> float:
        """Return the value of one graph."""

    def _explained(
        self, evidence: Evidence, example: int, graph: Any
    ) -> tuple[GeometricExplainer, GeometricExplanation]:
        from maskhooks_geometric.given import explained

        assert evidence.hooked is not None
        kept = self._kept(evidence, example)
        edges = evidence.columns["edge"][evidence.groups[example]]
        count = graph.edge_index.shape[1]
        if len(edges) and not 0 <= edges.min() <= edges.max() < count:
            raise SettingError(f"the explanation has an edge {edges.max()}, and its graph {count} edges. {_ONE}")
        mask = torch.zeros(count)
        mask[torch.from_numpy(edges[kept].astype(np.int64))] = 1
        return explained(evidence.hooked, graph, mask)

    def _kept(self, evidence: Evidence, example: int) -> Any:
        if self.share is None:
            return evidence.kept()[example]
        scores = evidence.scores(absolute=self.absolute)[example]
        ties = np.random.default_rng([self.seed, int(evidence.examples[example])]).random(len(scores))
        kept = np.zeros(len(scores), bool)
        kept[np.lexsort([ties, -scores])[: int(np.ceil(round(self.share * len(scores), 6)))]] = True
        return kept


class FidelityPlus(GeometricMetric):
    """Whether the prediction changes without the edges that are kept, 1 or 0; the mean is in [0, 1], higher is better.

    1 - 1(the class with the complement of the mask = the class); of several predictions in a graph, the mean. By
    `torch_geometric.explain.metric.fidelity` for a model's explanation (Amara et al. 2022).

    Args:
        share, absolute, seed: as `GeometricMetric` takes them.
    """

    name = "fidelity-plus"
    better = "higher"
    source = "Amara et al. 2022, by PyTorch Geometric"

    def measured(self, explainer: GeometricExplainer, explanation: GeometricExplanation) -> float:
        return fidelity(explainer, explanation)[0]


class FidelityMinus(GeometricMetric):
    """Whether the prediction changes with only the edges that are kept, 1 or 0; the mean is in [0, 1], lower is better.

    1 - 1(the class with the mask = the class); of several predictions in a graph, the mean. By
    `torch_geometric.explain.metric.fidelity` for a model's explanation (Amara et al. 2022).

    Args:
        share, absolute, seed: as `GeometricMetric` takes them.
    """

    name = "fidelity-minus"
    better = "lower"
    source = "Amara et al. 2022, by PyTorch Geometric"

    def measured(self, explainer: GeometricExplainer, explanation: GeometricExplanation) -> float:
        return fidelity(explainer, explanation)[1]


class Characterization(GeometricMetric):
    """The weighted harmonic mean of fidelity plus and 1 - fidelity minus of a graph, in [0, 1]; higher is better.

    (w+ + w-) / (w+ / fid+ + w- / (1 - fid-)), and 0 if fid+ is 0 or fid- is 1. By
    `torch_geometric.explain.metric.characterization_score` (Amara et al. 2022). For one prediction in a graph it is 1
    if the edges are both necessary and sufficient, and else 0.

    Args:
        weight: w+, the weight of fidelity plus; w- is 1 - w+.
        share, absolute, seed: as `GeometricMetric` takes them.
    """

    name = "characterization"
    better = "higher"
    source = "Amara et al. 2022, by PyTorch Geometric"

    def __init__(
        self,
        *,
        weight: Fraction = 0.5,
        share: Annotated[float, Gt(0), Le(1)] | None = None,
        absolute: bool = False,
        seed: Seed = 0,
    ) -> None:
        super().__init__(share=share, absolute=absolute, seed=seed)
        self.weight = weight

    def measured(self, explainer: GeometricExplainer, explanation: GeometricExplanation) -> float:
        from torch_geometric.explain.metric import characterization_score

        plus, minus = (torch.tensor(one, dtype=torch.float64) for one in fidelity(explainer, explanation))
        return float(characterization_score(plus, minus, self.weight, 1.0 - self.weight))


class Unfaithfulness(GeometricMetric):
    """1 - exp(-KL) between the prediction and that with only the edges that are kept, in [0, 1]; lower is better.

    By `torch_geometric.explain.metric.unfaithfulness`, which documents KL(y, y_masked) and computes KL(y_masked, y), as
    GraphXAI does (Agarwal et al. 2023, graph explanation unfaithfulness). It is always 0 for a model with a single
    logit, so these are refused.

    Args:
        share, absolute, seed: as `GeometricMetric` takes them.
    """

    name = "unfaithfulness"
    better = "lower"
    unit = "1 - exp(-nats)"
    source = "Agarwal et al. 2023, by PyTorch Geometric"

    def measured(self, explainer: GeometricExplainer, explanation: GeometricExplanation) -> float:
        from torch_geometric.explain.metric import unfaithfulness

        if explainer.model_config.mode.value != "multiclass_classification":
            raise SettingError(
                f"the metric {self.name!r} is always 0 for a model with a single logit. Use 'fidelity-minus', or "
                "'divergence', which removes the values of edges"
            )
        return float(unfaithfulness(explainer, explanation))


def fidelity(explainer: GeometricExplainer, explanation: GeometricExplanation) -> tuple[float, float]:
    """Return fidelity plus and minus of one graph."""
    from torch_geometric.explain.metric import fidelity as of_geometric

    plus, minus = of_geometric(explainer, explanation)
    return float(plus), float(minus)


def _graphs(evidence: Evidence) -> Iterator[tuple[int, Any]]:
    """Yield each graph of the batches, with its example index.

    Raises:
        SettingError: the explanation is not of the edges of graphs, or of other graphs.
    """
    hooked = evidence.hooked
    assert hooked is not None
    try:
        import torch_geometric.explain  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch_geometric", "geometric", "metrics of graphs") from error
    from maskhooks_geometric.given import graphs

    (site,) = hooked.find(evidence.site)
    if "edge" not in site.tags or "relation" in evidence.columns:
        raise SettingError(
            f"this metric needs scores of the edges of graphs with one type of edge, and {site} has none. Explain the "
            'sites tagged "edge" of a model of PyTorch Geometric'
        )
    number = evidence.start_index
    for batch in evidence.batches:
        try:
            found = graphs(hooked, move(batch, device_of(hooked.model)))
        except ModelError as error:
            raise SettingError(f"this metric is for models of PyTorch Geometric: {error}") from error
        for graph in found:
            yield number, graph
            number += 1
    beyond = evidence.examples[(evidence.examples < evidence.start_index) | (evidence.examples >= number)]
    if len(beyond):
        raise SettingError(f"the explanation has an example {beyond[0]}, and the batches {number} graphs. {_ONE}")
