"""Explanations of PyTorch Geometric with a given mask, for its metrics."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch_geometric.explain import Explainer as GeometricExplainer
from torch_geometric.explain import Explanation as GeometricExplanation
from torch_geometric.explain.algorithm import ExplainerAlgorithm

from maskhooks.model.hooked import Hooked
from maskhooks_geometric.peer import Peer
from maskhooks_geometric.restored import restored


class Given(ExplainerAlgorithm):  # type: ignore[misc] # PyG has no types
    """An algorithm whose edge mask is given."""

    def __init__(self, mask: Float[Tensor, " edge"]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, model: torch.nn.Module, x: Any, edge_index: Any, **_: Any) -> GeometricExplanation:
        return GeometricExplanation(edge_mask=self.mask.to(edge_index.device))

    def supports(self) -> bool:
        return True


def graphs(hooked: Hooked, batch: Any) -> list[Any]:
    """Return a batch graph by graph.

    Raises:
        ModelError: the model holds no layer of PyTorch Geometric.
        BatchError: it cannot be split.
    """
    return Peer(hooked, Given(torch.empty(0))).graphs(batch)


def explained(
    hooked: Hooked, graph: Any, mask: Float[Tensor, " edge"]
) -> tuple[GeometricExplainer, GeometricExplanation]:
    """Return an explainer of a graph and the explanation with this mask; the model is restored."""
    peer = Peer(hooked, Given(mask))
    explainer, x, edges, rest = peer.question(graph)
    with restored(hooked.model), torch.no_grad():
        return explainer, explainer(x, edges, **rest)
