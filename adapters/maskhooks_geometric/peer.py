"""Runs an explainer of PyTorch Geometric as one of maskhooks, for comparison, and restores the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch_geometric.explain import Explainer as GeometricExplainer
from torch_geometric.explain import PGExplainer
from torch_geometric.explain.algorithm import ExplainerAlgorithm
from torch_geometric.explain.config import ExplanationType

from maskhooks.errors import BatchError, ModelError
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Scores
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs, Positions
from maskhooks.model.task import device_of, move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.seeds import seeded
from maskhooks.settings.types import Seed
from maskhooks.sites.signature import signature
from maskhooks.sites.site import Site
from maskhooks_geometric.heads import level_of
from maskhooks_geometric.restored import restored
from maskhooks_geometric.task import GraphTask

_MODES = {True: "multiclass_classification", False: "binary_classification"}
_FIT, _EXPLAIN = 300, 301


class Peer(Explainer):
    """Scores edges by an algorithm of `torch_geometric.explain`, in the same rows as maskhooks explainers.

    Each graph of a batch is explained separately. Algorithms leave parts of a model changed; these are restored.

    Args:
        hooked: the wrapped model; it returns logits.
        algorithm: such as `GNNExplainer(epochs=100)` or `PGExplainer(epochs=30)`; `fit` trains the latter.
        settings: more settings of `torch_geometric.explain.Explainer`, such as `node_mask_type="attributes"`.
        seed: the random seed.

    Attributes:
        changed: names of the weights and attributes that the algorithm changed before they were restored.

    Raises:
        ModelError: the model holds no layer of PyTorch Geometric.
    """

    name = "pyg"

    def __init__(self, hooked: Hooked, algorithm: ExplainerAlgorithm, *, seed: Seed = 0, **settings: Any) -> None:
        super().__init__(hooked, seed=seed)
        if not isinstance(hooked.task, GraphTask) or not hooked.sites.tagged("edge"):
            raise ModelError("PyTorch Geometric explains models with its layers, and this one holds none")
        self.algorithm, self.config = algorithm, settings
        self.changed: set[str] = set()
        (self.site,) = hooked.sites.tagged("edge")

    @property
    def reads(self) -> Sequence[Site]:
        return [self.site]

    def fit(self, train: Iterable[Any], validation: Iterable[Any] | None = None) -> Peer:
        """Trains an algorithm that has a `train`, for as many epochs as it has been given; others learn nothing."""
        learn = getattr(type(self.algorithm), "train", None)
        if learn is None or learn is torch.nn.Module.train:
            return self
        self.algorithm.to(device_of(self.hooked.model))
        batches = list(train)
        for epoch in range(self.algorithm.epochs):
            for number, batch in enumerate(batches):
                with restored(self.hooked.model) as changed, torch.enable_grad():
                    torch.manual_seed(seeded(self.seed, _FIT, epoch, number))
                    for graph in self._graphs(move(batch, device_of(self.hooked.model))):
                        explainer, x, edges, rest = self._question(graph)
                        target = _target(explainer, x, edges, rest)
                        self.algorithm.train(epoch, self.hooked.model, x, edges, target=target, **rest)
                self.changed |= set(changed)
        return self

    def scores(self, clean: Clean) -> list[Scores]:
        with restored(self.hooked.model) as changed, torch.enable_grad():
            torch.manual_seed(seeded(self.seed, _EXPLAIN))
            found = []
            for graph in self._graphs(clean.batch):
                explainer, x, edges, rest = self._question(graph)
                if explainer.explanation_type == ExplanationType.phenomenon:
                    rest["target"] = _target(explainer, x, edges, rest)
                found.append(explainer(x, edges, **rest))
        self.changed |= set(changed)
        return [self.site_scores(clean, self.site, self.site.depth or 0, self._rows(clean, found))]

    def _graphs(self, batch: Any) -> list[Any]:
        """The batch, graph by graph."""
        if hasattr(batch, "to_data_list"):
            return list(batch.to_data_list())
        if self._task.graphs(batch).count > 1:
            raise BatchError("the batch of several graphs cannot be split. Give a torch_geometric.data.Batch")
        return [batch]

    @property
    def _task(self) -> GraphTask:
        assert isinstance(self.hooked.task, GraphTask)
        return self.hooked.task

    def _question(self, graph: Any) -> tuple[GeometricExplainer, Any, Any, dict[str, Any]]:
        """An explainer for one graph, and its arguments."""
        hooked = self.hooked
        outputs = clean_pass(hooked, graph, []).outputs
        args, kwargs = self._task.arguments(hooked.model, graph)
        x, edges, *_ = given = signature(hooked.model).bind(*args, **kwargs).arguments.values()
        names = list(signature(hooked.model).bind(*args, **kwargs).arguments)
        rest = dict(list(zip(names, given, strict=True))[2:])
        level = level_of(hooked(graph), self._task.graphs(graph), self._task.level)
        index = self._task.chosen(graph, level)
        kind = "phenomenon" if isinstance(self.algorithm, PGExplainer) else "model"  # it knows no other
        settings = {"edge_mask_type": "object", "explanation_type": kind, **self.config}
        explainer = GeometricExplainer(
            hooked.model,
            self.algorithm,
            model_config={
                "mode": _MODES[_classes(outputs)],
                "task_level": "edge" if level == "link" else level,
                "return_type": "raw",
            },
            **settings,
        )
        return explainer, x, edges, rest if index is None else {**rest, "index": index}

    def _rows(self, clean: Clean, found: Sequence[Any]) -> Tensor:
        """The masks of all graphs, in the rows of the site."""
        columns = self._task.messages(clean.batch, self.site, clean.values).columns(called=False)
        examples = self._task.example_index(self.site, clean.batch, clean.values)
        assert examples is not None
        relations = self._task.graphs(clean.batch).relations
        scores = torch.zeros(len(examples))
        for number, explanation in enumerate(found):
            for kind, relation in enumerate(relations or [None]):
                mask = _mask(explanation if relation is None else explanation[relation])
                mine = (examples == number) & (columns["edge"] >= 0)
                mine = mine if relation is None else mine & (columns["relation"] == kind)
                scores[mine.cpu()] = mask[columns["edge"][mine].to(mask.device)].cpu()
        return scores[:, None].squeeze(1).clamp(0, 1)


def _mask(explanation: Any) -> Tensor:
    mask = explanation.get("edge_mask")
    if not isinstance(mask, Tensor):
        raise BatchError("the algorithm returned no edge mask. Choose another algorithm, or other settings")
    return mask.detach().float()


def _classes(outputs: Outputs) -> bool:
    """Whether predictions have several classes; otherwise they are a single binary logit."""
    if isinstance(outputs, Mapping):
        raise BatchError("PyTorch Geometric explains one output, and this model has several")
    return isinstance(outputs.distribution if isinstance(outputs, Positions) else outputs, Categorical)


def _target(explainer: GeometricExplainer, x: Any, edges: Any, rest: Mapping[str, Any]) -> Tensor:
    """The model's prediction."""
    target: Tensor = explainer.get_target(explainer.get_prediction(x, edges, **_without(rest, "index")))
    return target


def _without(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}
