"""A maskhooks explainer as an algorithm of `torch_geometric.explain.Explainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.explain import Explanation, HeteroExplanation
from torch_geometric.explain.algorithm import ExplainerAlgorithm
from torch_geometric.explain.config import ExplanationType, MaskType, ModelMode, ModelReturnType, ModelTaskLevel

from maskhooks.errors import ModelError, SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import Outputs
from maskhooks.model.wrapping import wrap
from maskhooks.sites.signature import signature
from maskhooks_geometric.masks import edge_masks
from maskhooks_geometric.task import GraphTask

_LEVELS = {ModelTaskLevel.node: "node", ModelTaskLevel.edge: "link", ModelTaskLevel.graph: "graph"}


class MaskAlgorithm(ExplainerAlgorithm):  # type: ignore[misc] # PyG has no types
    """Explains with masks of messages, or of edges in every layer at once.

    The result is PyG's `Explanation` or `HeteroExplanation` with `edge_mask`, a number in [0, 1] per edge, and
    `edge_mask_by_layer`, a column per masked site; `layers` holds the sites' addresses. The model is left unchanged.

    Args:
        explainer: an explainer of a `Hooked` on the same model, fitted if it is amortised; or a function that makes
            one from a `Hooked`, such as `lambda hooked: DiffMask(hooked, "message", amortized=False)`.
        reduce: how layers are combined into `edge_mask`, "max" or "mean".

    Raises:
        SettingError: `reduce` is neither.
    """

    def __init__(self, explainer: Explainer | Callable[[Hooked], Explainer], *, reduce: str = "max") -> None:
        super().__init__()
        if reduce not in ("max", "mean"):
            raise SettingError(f"reduce={reduce!r} is not known. Combine the masks of layers by 'max' or 'mean'")
        self.reduce = reduce
        self._given = explainer

    def supports(self) -> bool:
        """Whether PyG asks for edge masks alone, of the model's own prediction, in classification."""
        config = self.explainer_config
        return (
            config.explanation_type == ExplanationType.model
            and config.node_mask_type is None
            and config.edge_mask_type == MaskType.object
            and self.model_config.mode != ModelMode.regression
        )

    @torch.enable_grad()
    def forward(
        self, model: nn.Module, x: Any, edge_index: Any, *, target: Tensor, index: Any = None, **kwargs: Any
    ) -> Explanation | HeteroExplanation:
        hetero = isinstance(x, Mapping)
        level = _LEVELS[self.model_config.task_level]
        given = {**_named(model, x, edge_index), **kwargs, "y": target}
        if index is not None and level != "graph":
            given[f"{level}_index"] = torch.as_tensor(index).reshape(-1)
        batch = Data(**given) if isinstance(x, Tensor) else given  # the batch that a user's own functions expect
        explainer = self._explainer(model, tuple(kwargs))
        explanation = explainer.explain(batch)
        masks = edge_masks(explanation, GraphTask().serve(model).graphs(batch))
        if not hetero:
            found = masks[None]
            edges = found.over_layers(self.reduce).to(edge_index.device)
            result = Explanation(edge_mask=edges, edge_mask_by_layer=found.by_layer.to(edges.device))
            result.layers = list(found.sites)
            return result
        typed = HeteroExplanation()
        for relation, found in masks.items():
            device = edge_index[relation].device
            typed[relation].edge_mask = found.over_layers(self.reduce).to(device)
            typed[relation].edge_mask_by_layer = found.by_layer.to(device)
            typed[relation].layers = list(found.sites)
        return typed

    def _explainer(self, model: nn.Module, extra: Sequence[str]) -> Explainer:
        if not isinstance(self._given, Explainer):
            task = _Configured(self.model_config.mode, self.model_config.return_type, extra)
            settings = {"level": _LEVELS[self.model_config.task_level]}
            return self._given(wrap(model, task=task.serve(model).with_options(settings)))
        if self._given.hooked.model is not model:
            raise ModelError(
                f"the explainer was made for another model, a {type(self._given.hooked.model).__name__}, than the one "
                "to explain. Make it from maskhooks.wrap(model), or give a function that makes it"
            )
        return self._given


def _named(model: nn.Module, x: Any, edge_index: Any) -> dict[str, Any]:
    """A model's first two arguments by PyG's names and by the model's own."""
    names = ("x_dict", "edge_index_dict") if isinstance(x, Mapping) else ("x", "edge_index")
    every = signature(model).parameters.values()
    own = [part.name for part in every if part.kind in (part.POSITIONAL_ONLY, part.POSITIONAL_OR_KEYWORD)]
    return {**dict(zip(own, (x, edge_index), strict=False)), **dict(zip(names, (x, edge_index), strict=True))}


class _Configured(GraphTask):
    """Reads outputs as PyG's configuration says, and calls the model as PyG does: its first two arguments by position.

    Args:
        extra: the names of the other arguments.
    """

    def __init__(self, mode: ModelMode, returns: ModelReturnType, extra: Sequence[str]) -> None:
        super().__init__()
        self._mode, self._returns, self._extra = mode, returns, extra

    def arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        graphs = self.graphs(batch)
        first = ("x_dict", "edge_index_dict") if graphs.hetero else ("x", "edge_index")
        return tuple(map(graphs.get, first)), {name: graphs.get(name) for name in self._extra}

    def distribution(self, result: Any, batch: Any) -> Outputs:
        if isinstance(result, Tensor) and self._returns == ModelReturnType.probs:
            binary = self._mode == ModelMode.binary_classification
            result = torch.logit(result, 1e-7) if binary else result.clamp(min=1e-30).log()
        return super().distribution(result, batch)
