"""Checks, before the model runs, that the parts of a batch of graphs fit together and fit the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maskhooks.errors import BatchError
from maskhooks_geometric.graphs import Graphs, Relation

_PER_EDGE = ("edge_attr", "edge_weight", "edge_type")


def check(graphs: Graphs, device: torch.device) -> None:
    """Check that edges connect existing nodes, features match their edges, and all is on the model's device.

    Raises:
        BatchError: they do not, or the batch is a list of graphs.
    """
    _check_kind(graphs.batch)
    for name, value in _tensors(graphs):
        if value.device != device:
            raise BatchError(
                f"{name} is on {value.device}, and the model on {device}. Move the batch: batch.to({str(device)!r})"
            )
    relations: list[Relation | None] = [*graphs.relations] or [None]
    kinds: list[str | None] = [*graphs.node_types] or [None]
    for kind in kinds:
        graph_index, nodes = graphs.graph_of(kind), graphs.nodes(kind)
        if graph_index is not None and nodes and len(graph_index) != nodes:
            raise BatchError(
                f"`batch`{f' of {kind}' if kind else ''} has {len(graph_index)} graph indices for {nodes} nodes. "
                "Give one for each node"
            )
    for relation in relations:
        adjacency = graphs.adjacency(relation)
        if isinstance(adjacency, Tensor) and adjacency.layout == torch.strided:
            _check_edges(graphs, relation, adjacency.as_subclass(Tensor))


def _check_kind(batch: Any) -> None:
    if not isinstance(batch, (tuple, list)) or not batch:
        return
    if any(hasattr(part, "edge_stores") for part in batch):
        raise BatchError(
            f"the batch is a {type(batch).__name__} of {len(batch)} graphs. Combine them: "
            "torch_geometric.data.Batch.from_data_list(graphs), or use a torch_geometric.loader.DataLoader"
        )
    if isinstance(batch[0], str):
        raise BatchError(
            f"the batch is a pair that begins with {batch[0]!r}: a single Data or Batch was given where a loader "
            "belongs, and its parts are read as batches. Give a list: [batch]"
        )


def _tensors(graphs: Graphs) -> Iterator[tuple[str, Tensor]]:
    """The tensors that models take from graphs, by name."""
    for name in ("x", "edge_index", *_PER_EDGE):
        value = graphs.get(f"{name}_dict" if graphs.hetero else name)
        parts = value if isinstance(value, dict) else {"": value}
        yield from ((f"{name} of {key}" if key else name, v) for key, v in parts.items() if isinstance(v, Tensor))


def _check_edges(graphs: Graphs, relation: Relation | None, edges: Tensor) -> None:
    where = "edge_index" if relation is None else f"edge_index of {relation}"
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        raise BatchError(
            f"{where} has shape {list(edges.shape)} and type {edges.dtype}. Give two rows of integers, the source and "
            "the target node of each edge. If it has a row for each edge, transpose it: edge_index.t()"
        )
    for name in _PER_EDGE:
        given: Any = graphs.get(name) if relation is None else (graphs.get(f"{name}_dict") or {}).get(relation)
        if isinstance(given, Tensor) and given.dim() and len(given) != edges.shape[1]:
            raise BatchError(
                f"{where} holds {edges.shape[1]} edges, and {name} has {len(given)} rows. Give one for each edge"
            )
    if not edges.numel() or (relation is None and isinstance(graphs.get("x"), (tuple, list))):
        return  # no edges, or edges between two sets of nodes
    counts = [graphs.nodes(kind) for kind in ((None, None) if relation is None else relation[::2])]
    largest, least = edges.amax(1).tolist(), int(edges.min())
    for end, top, count in zip(("source", "target"), largest, counts, strict=True):
        if least < 0 or top >= count > 0:
            raise BatchError(
                f"{where} does not match the nodes: it has {least if least < 0 else top} as a {end}, and there are "
                f"{count} nodes, numbered from 0. Give the edge_index of this graph"
            )
