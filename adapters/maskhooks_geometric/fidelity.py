"""Metrics of explanations of graphs, as PyTorch Geometric computes them, one graph at a time.

An explanation of edges or of nodes is made hard first: an edge or node is kept or not. PyG multiplies the messages of
an edge, in all layers at once, and the features of a node, by 1 or 0. The model still counts edges that it does not
keep, as in the degrees of a GCN, and keeps self-loops that it adds by itself, so this is not the graph without them.

Outputs with one logit are read as two classes, of which PyG would compute the softmax of one. Where there are several
predictions for a graph, such as one for each node, values are means over them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Gt, Le, Lt
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent

from maskhooks.errors import SettingError
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.metric import Metric
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs, Positions
from maskhooks.model.task import device_of, move
from maskhooks.seeds import seeded
from maskhooks.settings.types import Seed
from maskhooks_geometric.graphs import Graphs
from maskhooks_geometric.restored import restored
from maskhooks_geometric.task import GraphTask

_TIES = 340  # the purpose of random numbers


class GraphMetric(Metric):
    """A metric of PyG of the edges or nodes of a graph that an explanation keeps.

    Args:
        share: the share of edges or nodes that is kept, those of the highest scores, rounded up; None for those that
            the explanation keeps, by its threshold. Scores that are not P(kept) need a share.
        absolute: as `Metric` takes it, where there is a share.
        seed: the random seed, for the order of equal scores.
    """

    needs = frozenset({"hooked"})
    range = (0.0, 1.0)

    def __init__(
        self, *, share: Annotated[float, Gt(0), Le(1)] | None = None, absolute: bool = False, seed: Seed = 0
    ) -> None:
        super().__init__(absolute=absolute)
        self.share, self.seed = share, seed

    def __call__(self, evidence: Evidence) -> Floats:
        found = np.full(len(evidence.examples), np.nan)
        hooked, first = evidence.hooked, evidence.start_index
        assert hooked is not None
        if not isinstance(hooked.task, GraphTask):
            raise SettingError(
                f"the metric {self.name!r} is for graph networks of PyTorch Geometric, and this is a "
                f"{type(hooked.model).__name__} with the task {hooked.task.name!r}. For other models: 'sufficiency'"
            )
        with torch.no_grad(), restored(hooked.model), hooked.tap():
            for batch in evidence.batches:
                on_device = move(batch, device_of(hooked.model))
                count = hooked.task.graphs(on_device).count
                for at in np.flatnonzero((evidence.examples >= first) & (evidence.examples < first + count)):
                    one = _one(hooked.task, on_device, int(evidence.examples[at]) - first, count)
                    found[at] = self.measured(*self._of_pyg(evidence, hooked, one, int(at)))
                first += count
        evidence.check_reached(first)
        return found

    @abstractmethod
    def measured(self, explainer: Any, explanation: Any) -> float:
        """Return the value of one graph, from an `Explainer` and an `Explanation` of PyG."""

    def _of_pyg(self, evidence: Evidence, hooked: Hooked, batch: Any, at: int) -> tuple[Any, Any]:
        from torch_geometric.explain import Explainer, Explanation
        from torch_geometric.explain.algorithm import DummyExplainer

        graphs = hooked.task.graphs(batch)  # type: ignore[attr-defined] # a GraphTask
        x, edges = graphs.get("x"), graphs.adjacency()
        if graphs.hetero or not isinstance(x, Tensor) or not isinstance(edges, Tensor) or edges.layout != torch.strided:
            raise SettingError(
                f"the metric {self.name!r} needs graphs with one type of nodes and edges, features x and an "
                "edge_index, because PyG's does. For others: 'sufficiency' and 'comprehensiveness'"
            )
        masks = self._masks(evidence, hooked, graphs, at)
        model = _Called(hooked, batch, x)
        explainer = Explainer(
            model,
            algorithm=DummyExplainer(),
            explanation_type="model",
            model_config={"mode": "multiclass_classification", "task_level": "graph", "return_type": "raw"},
            **{f"{name}_type": "object" for name in masks},
        )
        explanation = Explanation(x=x, edge_index=edges, **masks)
        explanation._model_args = []
        explanation.prediction = explainer.get_prediction(x, edges)
        explanation.target = explainer.get_target(explanation.prediction)
        return explainer, explanation

    def _masks(self, evidence: Evidence, hooked: Hooked, graphs: Graphs, at: int) -> dict[str, Tensor]:
        """Return PyG's mask of an example, each number 0 or 1."""
        rows = evidence.groups[at]
        columns = {name: column[rows] for name, column in evidence.columns.items()}
        (site,) = hooked.find(evidence.site)
        edges, device = graphs.edges(), device_of(hooked.model)
        if "edge" in columns and edges is not None:
            numbers = graphs.edge_numbers().cpu().numpy()
            own = columns["edge"] >= 0
            columns = {name: column[own] for name, column in columns.items()}
            order = np.argsort(numbers, kind="stable")
            place = order[np.searchsorted(numbers, columns["edge"], sorter=order).clip(max=len(order) - 1)]
            ends = graphs.numbers().cpu()[edges.cpu()].numpy()[place]
            same = numbers[place] == columns["edge"]
            same &= (ends[:, 0] == columns["source"]) & (ends[:, 1] == columns["target"])
            self._check(bool(same.all()), evidence, at)
            return {"edge_mask": self._hard(columns, place, len(numbers), evidence.examples[at]).to(device)}
        if site.gating().positions == ("node",) and not site.gating().groups:
            place, count = columns["position"], graphs.nodes()
            self._check(bool((place < count).all()), evidence, at)
            if not graphs.get("x").is_floating_point():
                raise SettingError(
                    f"the metric {self.name!r} multiplies the features of nodes, and these are whole numbers. Explain "
                    "edges, or use 'sufficiency'"
                )
            return {"node_mask": self._hard(columns, place, count, evidence.examples[at]).to(device)[:, None]}
        raise SettingError(
            f"the metric {self.name!r} needs scores of edges or of nodes, and site {evidence.site} has neither. "
            "Explain sites tagged 'message' or 'edge'"
        )

    def _check(self, same: bool, evidence: Evidence, at: int) -> None:
        if not same:
            raise SettingError(
                f"the batches are not those that were explained: example {evidence.examples[at]} has other edges or "
                "nodes. Give the same batches in the same order, without shuffling"
            )

    def _hard(self, columns: Mapping[str, Any], place: npt.NDArray[Any], count: int, example: int) -> Tensor:
        """Return 1 for each edge or node that is kept; of several messages along an edge the highest score counts."""
        if self.share is None:
            kept = np.zeros(count, bool)
            np.logical_or.at(kept, place, columns["kept"])
            return torch.from_numpy(kept).float()
        scores = np.full(count, -np.inf)
        given = columns["score"].astype(np.float64)
        np.maximum.at(scores, place, np.abs(given) if self.absolute else given)
        known = int(np.isfinite(scores).sum())
        ties = np.random.default_rng(seeded(self.seed, _TIES, int(example))).random(count)
        order = np.lexsort([ties, -scores])[: int(np.ceil(round(self.share * known, 6)))]
        mask = torch.zeros(count)
        mask[torch.from_numpy(order)] = 1
        return mask


class FidelityPlus(GraphMetric):
    """1 if the predicted class changes without the edges or nodes that are kept, else 0; higher is better.

    PyG's fidelity+ of an explanation of the model (Amara et al. 2022), of hard labels.

    Args:
        share, absolute, seed: as `GraphMetric` takes them.
    """

    name = "fidelity-plus"
    better = "higher"
    unit = "share of predictions"
    source = "Amara et al. 2022; torch_geometric.explain.metric.fidelity"

    def measured(self, explainer: Any, explanation: Any) -> float:
        return _fidelity(explainer, explanation)[0]


class FidelityMinus(GraphMetric):
    """1 if the predicted class changes with only the edges or nodes that are kept, else 0; lower is better.

    PyG's fidelity- of an explanation of the model (Amara et al. 2022), of hard labels.

    Args:
        share, absolute, seed: as `GraphMetric` takes them.
    """

    name = "fidelity-minus"
    better = "lower"
    unit = "share of predictions"
    source = "Amara et al. 2022; torch_geometric.explain.metric.fidelity"

    def measured(self, explainer: Any, explanation: Any) -> float:
        return _fidelity(explainer, explanation)[1]


class Characterization(GraphMetric):
    """The weighted harmonic mean of fidelity+ and 1 - fidelity-, in [0, 1]; higher is better.

    1 / (w / fidelity+ + (1 - w) / (1 - fidelity-)), 0 if a denominator is 0 (Amara et al. 2022). It is computed for
    each graph: with one prediction for a graph it is 1 if the prediction changes without the explanation and not with
    it alone, and its mean is not the value of mean fidelities, which the paper reports.

    Args:
        weight: the weight w of fidelity+.
        share, absolute, seed: as `GraphMetric` takes them.
    """

    name = "characterization"
    better = "higher"
    unit = "score"
    source = "Amara et al. 2022; torch_geometric.explain.metric.characterization_score"

    def __init__(
        self,
        *,
        weight: Annotated[float, Gt(0), Lt(1)] = 0.5,
        share: Annotated[float, Gt(0), Le(1)] | None = None,
        absolute: bool = False,
        seed: Seed = 0,
    ) -> None:
        super().__init__(share=share, absolute=absolute, seed=seed)
        self.weight = weight

    def measured(self, explainer: Any, explanation: Any) -> float:
        from torch_geometric.explain.metric import characterization_score

        plus, minus = map(torch.tensor, _fidelity(explainer, explanation))
        return float(characterization_score(plus, minus, self.weight, 1 - self.weight))


class Unfaithfulness(GraphMetric):
    """1 - exp(-KL(y', y)) of the outputs y and y' with only the edges or nodes that are kept, in [0, 1].

    Lower is better. PyG's graph explanation faithfulness (Agarwal et al. 2023): its documentation has KL(y, y'), its
    code, and so this, the other direction.

    Args:
        share, absolute, seed: as `GraphMetric` takes them.
    """

    name = "unfaithfulness"
    better = "lower"
    unit = "1 - exp(-nats)"
    source = "Agarwal et al. 2023; torch_geometric.explain.metric.unfaithfulness"

    def measured(self, explainer: Any, explanation: Any) -> float:
        from torch_geometric.explain.metric import unfaithfulness

        return max(0.0, float(unfaithfulness(explainer, explanation)))


def _fidelity(explainer: Any, explanation: Any) -> tuple[float, float]:
    from torch_geometric.explain.metric import fidelity

    found: tuple[float, float] = fidelity(explainer, explanation)
    return found


class _Called(nn.Module):
    """A model as PyG calls it, with the features and edges of a graph; its outputs are logits of classes.

    Args:
        hooked: the wrapped model.
        batch: the graph.
        x: its features.
    """

    def __init__(self, hooked: Hooked, batch: Any, x: Tensor) -> None:
        super().__init__()
        self.model = hooked.model
        self.training = False  # as the model is while it is tapped
        self._run: Callable[[Any], Outputs] = lambda one: hooked.distribution(hooked(one), one)
        self._batch, self._x = batch, x

    def forward(self, x: Tensor, edge_index: Tensor) -> Float[Tensor, "prediction cls"]:
        return _logits(self._run(self._batch if x is self._x else _with(self._batch, x)))


def _with(batch: Any, x: Tensor) -> Any:
    """Return a batch with other features."""
    if isinstance(batch, Mapping):
        return {**batch, "x": x}
    if not hasattr(batch, "edge_index"):
        raise SettingError("masks of nodes need a Data object or a mapping, whose x can be replaced")
    other = copy.copy(batch)
    other.x = x
    return other


def _logits(outputs: Outputs) -> Float[Tensor, "prediction cls"]:
    chosen = outputs.chosen if isinstance(outputs, Positions) else None
    found: Any = outputs.distribution if isinstance(outputs, Positions) else outputs
    while isinstance(found, Independent):
        found = found.base_dist
    if not isinstance(found, (Categorical, Bernoulli)):
        raise SettingError(
            f"PyG's metrics are for classes, and the outputs are {type(found).__name__}. For others: 'divergence'"
        )
    logits: Tensor = found.logits if chosen is None else found.logits[chosen]
    if isinstance(found, Bernoulli):
        logits = torch.stack([torch.zeros_like(logits), logits], -1)
    return logits.reshape(-1, logits.shape[-1])


def _one(task: GraphTask, batch: Any, number: int, count: int) -> Any:
    """Return one graph of a batch."""
    found = batch if count == 1 else task.select_rows(batch, [number])
    if found is None:
        raise SettingError(
            "PyG's metrics take one graph at a time, and these cannot be taken apart. Make batches with "
            "torch_geometric.data.Batch.from_data_list, or give wrap(model, select=lambda batch, numbers: ...)"
        )
    return found
