"""Converts the rows of an explanation to PyG's edge masks, one number per edge of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks_geometric.graphs import Graphs, Relation


@dataclass(frozen=True)
class EdgeMasks:
    """The scores of an explanation for the edges of one type.

    Attributes:
        by_layer: one column per masked site; 0 if a site has no message along an edge.
        sites: the addresses of the columns.
    """

    by_layer: Float[Tensor, "edge layer"]
    sites: tuple[str, ...]

    def over_layers(self, reduce: str) -> Float[Tensor, " edge"]:
        """The maximum or the mean over layers; 0 if there are none."""
        if not self.by_layer.shape[1]:
            return self.by_layer.new_zeros(len(self.by_layer))
        return self.by_layer.amax(1) if reduce == "max" else self.by_layer.mean(1)


def edge_masks(explanation: Explanation, graphs: Graphs) -> dict[Relation | None, EdgeMasks]:
    """The scores of a batch's edges, by edge type; the maximum over several messages along one edge in a layer.

    Args:
        explanation: an explanation of the batch, its examples numbered from 0.

    Raises:
        SettingError: the rows are not edges.
    """
    if "edge" not in explanation.columns:
        raise SettingError(
            f"the explanation of {', '.join(explanation.sites)} has no edges. Mask sites tagged 'message', or 'edge'"
        )
    relations: list[Relation | None] = [*graphs.relations] or [None]
    return {
        relation: _of(explanation, graphs, relation, number if relation is not None else None)
        for number, relation in enumerate(relations)
    }


def _of(explanation: Explanation, graphs: Graphs, relation: Relation | None, number: int | None) -> EdgeMasks:
    columns = explanation.columns
    chosen = (columns["edge"] >= 0) & columns["valid"]
    if number is not None:
        chosen &= columns["relation"] == number
    edges = graphs.edges(relation)
    count = 0 if edges is None else len(edges)
    here, layer = np.unique(columns["site"][chosen], return_inverse=True)
    masks = torch.zeros(count, len(here))
    if edges is not None and count:
        graph_index = graphs.graph_of(relation and relation[2])
        graph = torch.zeros(count, dtype=torch.long) if graph_index is None else graph_index[edges[:, 1]].cpu()
        numbers = graphs.edge_numbers(relation).cpu()
        example, edge = (torch.as_tensor(columns[name][chosen], dtype=torch.long) for name in ("example", "edge"))
        width = int(numbers.max()) + 1
        known, which = torch.unique(graph * width + numbers, return_inverse=True)
        row = torch.searchsorted(known, example * width + edge)
        cells = row * len(here) + torch.as_tensor(layer, dtype=torch.long)
        scores = torch.as_tensor(columns["score"][chosen], dtype=torch.float32)
        found = torch.zeros(len(known) * len(here)).scatter_reduce(0, cells, scores, "amax")
        masks = found.view(len(known), len(here))[which]
    return EdgeMasks(masks, tuple(explanation.sites[site] for site in here))
