"""Reads the graphs of a batch, whether it is PyG's data object, a mapping, or a tuple of arguments."""

from __future__ import annotations

import functools
import inspect
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from maskhooks.errors import BatchError
from maskhooks.sites.example_index import ExampleIndex
from maskhooks_geometric.edges import rows

Relation = tuple[str, str, str]


def code(name: str) -> int | None:
    """A number below -1 for the edge type in PyG's name of a layer; None if the name has none."""
    return next((_code(ends) for part in name.split(".") if (ends := _ends(part))), None)


def untyped(name: str) -> str:
    """The name of a layer without its edge type; layers that serve the other types share it."""
    return ".".join("*" if _ends(part) else part for part in name.split("."))


def _ends(part: str) -> list[str]:
    """The words of the edge type that a part of a name spells; empty if it spells none."""
    found = [end for end in re.split("_{2,}", part.strip("<>")) if end]
    return found if len(found) > 2 else []


def _code(ends: Sequence[str]) -> int:
    return -2 - zlib.crc32(re.sub(r"[^0-9A-Za-z]+", "_", "_".join(ends)).encode())


class Graphs:
    """The one or several graphs of a batch; properties are read once and cached.

    Args:
        batch: `Data`, `HeteroData` or a batch of them, a mapping, or a tuple of arguments.
        parameters: the names of the model's arguments, for a tuple.
        pairs: `batch -> nodes`, two rows: the pairs that link predictions are about.
    """

    def __init__(
        self, batch: Any, parameters: Sequence[str] = (), pairs: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.batch, self._pairs = batch, pairs
        if isinstance(batch, Tensor):
            batch = (batch,)
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
            batch = dict(zip(parameters, batch, strict=False))
        self._held = batch
        self._graph_indices: dict[str | None, Tensor | None] = {}
        self._called: dict[str | None, Tensor] = {}

    @functools.cached_property
    def hetero(self) -> bool:
        """Whether the batch has types of nodes or edges."""
        return hasattr(self._held, "node_types") or isinstance(self.get("x_dict"), Mapping)

    def get(self, name: str) -> Any:
        """The value of a field of the batch; None if it has none."""
        if isinstance(self._held, Mapping):
            return self._held.get(name)
        try:
            found = getattr(self._held, name, None)
            return None if inspect.ismethod(found) else found  # `size` is an argument of layers but a method of graphs
        except KeyError:  # HeteroData raises it for a name that ends in _dict, and for weights that no type has
            return None

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    @functools.cached_property
    def relations(self) -> list[Relation]:
        """The edge types, in order; empty for a homogeneous graph."""
        if not self.hetero:
            return []
        found = self.get("edge_types")
        return list(self.get("edge_index_dict") or () if found is None else found)

    @functools.cached_property
    def codes(self) -> dict[int, int]:
        """The index of each edge type by its `code`."""
        return {_code(relation): number for number, relation in enumerate(self.relations)}

    @functools.cached_property
    def node_types(self) -> list[str]:
        if not self.hetero:
            return []
        found = self.get("node_types")
        return list(self.get("x_dict") or () if found is None else found)

    def adjacency(self, relation: Relation | None = None) -> Any:
        """The edges of a relation, or of the only one: an edge_index or a sparse adjacency; None if there are none."""
        for name in ("edge_index", "adj_t"):
            found = self.get(name) if relation is None else (self.get(f"{name}_dict") or {}).get(relation)
            if found is not None:
                return found
        return None

    def edges(self, relation: Relation | None = None) -> Int[Tensor, "edge 2"] | None:
        """The two nodes of each edge, in order."""
        adjacency = self.adjacency(relation)
        return None if adjacency is None else torch.stack(rows(adjacency), 1)

    @functools.cached_property
    def connected(self) -> bool:
        """Whether there is an edge of any type."""
        return any(edges is not None and len(edges) > 0 for edges in map(self.edges, self.relations))

    def nodes(self, kind: str | None = None) -> int:
        """The number of nodes of one type, or of the only one."""
        store = self.store(kind)
        if store is not None and getattr(store, "num_nodes", None) is not None:
            return int(store.num_nodes)
        x = self.get("x") if kind is None else (self.get("x_dict") or {}).get(kind)
        if isinstance(x, (tuple, list)):
            x = x[-1]
        if isinstance(x, Tensor):
            return len(x)
        edges = self.edges() if kind is None else None
        return 0 if edges is None or not len(edges) else int(edges.max()) + 1

    @functools.cached_property
    def pairs(self) -> Int[Tensor, "2 link"] | None:
        """The nodes that link predictions are about; None if the batch names none.

        Raises:
            BatchError: they are not two rows of integers.
        """
        found = self.for_links("edge_label_index") if self._pairs is None else torch.as_tensor(self._pairs(self.batch))
        if found is not None and (found.dim() != 2 or len(found) != 2 or found.is_floating_point()):
            raise BatchError(
                f"the pairs of nodes that predictions are about have shape {list(found.shape)} and type {found.dtype}. "
                "Give two rows of integers, as in edge_label_index, or wrap(model, pairs=lambda batch: ...)"
            )
        return found

    def for_links(self, name: str) -> Tensor | None:
        """A field of the links to predict; with several edge types, the field of the only type that has it."""
        held = self.get(name)
        if held is None and self.hetero:
            held = self.get(f"{name}_dict")
        if isinstance(held, Mapping):
            held = next(iter(held.values())) if len(held) == 1 else None
        return held if isinstance(held, Tensor) else None

    def graph_of_links(self) -> Int[Tensor, " link"] | None:
        """The graph index of each pair; None if there is one graph."""
        if self.pairs is None or self.single:
            return None
        typed = self.get("edge_label_index_dict") if self.hetero and self._pairs is None else None
        kinds = [relation[0] for relation in typed] if isinstance(typed, Mapping) else []
        graph_index = self.graph_of(kinds[0] if kinds else None)
        if graph_index is None:
            raise BatchError(
                f"the batch holds {self.count} graphs, and the node types of the pairs are unknown. "
                "Put the pairs under an edge type: data['user', 'rates', 'film'].edge_label_index"
            )
        return graph_index[self.pairs[0]]

    @functools.cached_property
    def seeds(self) -> tuple[str | None, int] | None:
        """The node type and number of the seeds a loader sampled from, which come first; None if it did not sample."""
        kinds: list[str | None] = [*self.node_types] or [None]
        for kind in kinds:
            store = self.store(kind)
            count = getattr(store, "batch_size", None)
            if isinstance(count, int) and isinstance(getattr(store, "n_id", None), Tensor):
                return kind, count
        return None

    def graph_of(self, kind: str | None = None) -> Int[Tensor, " node"] | None:
        """The graph index of each node; None if there is one graph."""
        if kind not in self._graph_indices:
            self._graph_indices[kind] = self._graph_of(kind)
        return self._graph_indices[kind]

    def _graph_of(self, kind: str | None) -> Int[Tensor, " node"] | None:
        held = getattr(self.store(kind), "batch", None) if kind is not None else self.get("batch")
        return held if isinstance(held, Tensor) else None

    @functools.cached_property
    def single(self) -> bool:
        """Whether there is one graph.

        Raises:
            BatchError: there are several, and nothing says which one each node belongs to.
        """
        several = self.count > 1
        kinds: list[str | None] = [*self.node_types] or [None]
        if several and all(self.graph_of(kind) is None for kind in kinds):
            raise BatchError(
                f"the batch holds {self.count} graphs, and no `batch` that says which one each node belongs to. Make "
                "it with torch_geometric.data.Batch.from_data_list, or give wrap(model, example_index=...)"
            )
        return not several

    @functools.cached_property
    def count(self) -> int:
        """The number of graphs.

        Raises:
            BatchError: `batch` is not a tensor.
        """
        known = self.get("num_graphs")
        if isinstance(known, int):
            return known
        index = self.get("batch")
        if index is None and self.hetero:  # sampled around each node separately
            several = [
                graph_index
                for kind in self.node_types
                if (graph_index := self.graph_of(kind)) is not None and len(graph_index)
            ]
            return max((int(graph_index.max()) + 1 for graph_index in several), default=1)
        if index is None:
            return 1
        if not isinstance(index, Tensor):
            raise BatchError(f"`batch` is a {type(index)}. Give a tensor with the graph index of each node")
        return int(index.max()) + 1 if len(index) else 1

    def numbers(self, kind: str | None = None) -> Int[Tensor, " node"]:
        """Each node's number in the graph that it was sampled from, or else within its own graph."""
        if kind not in self._called:
            self._called[kind] = self._numbers(kind)
        return self._called[kind]

    def _numbers(self, kind: str | None) -> Int[Tensor, " node"]:
        store = self.store(kind)
        known = getattr(store, "n_id", None) if store is not None else self.get("n_id")
        if isinstance(known, Tensor):
            return known
        graph = self.graph_of(kind)
        if graph is None:
            adjacency = self.adjacency() if kind is None else None
            return torch.arange(self.nodes(kind), device=None if adjacency is None else rows(adjacency)[0].device)
        return ExampleIndex(graph, self.count).places()

    def edge_numbers(self, relation: Relation | None = None, called: bool = True) -> Int[Tensor, " edge"]:
        """Each edge's number in the graph that it was sampled from, or else its place in its own graph.

        Args:
            called: False for places even in a sampled graph.
        """
        store = self.store(relation)
        known = getattr(store, "e_id", None) if store is not None else self.get("e_id")
        ends = rows(self.adjacency(relation))[1]
        if called and isinstance(known, Tensor) and len(known) == len(ends):
            return known
        graph_index = self.graph_of(relation and relation[2])
        return (
            torch.arange(len(ends), device=ends.device)
            if graph_index is None
            else ExampleIndex(graph_index.index_select(0, ends), self.count).places()
        )

    def store(self, kind: str | Relation | None) -> Any:
        """The storage of the nodes or edges of a type, or of the only one; None for a mapping."""
        if isinstance(self._held, Mapping):
            return None
        return self._held if kind is None else self._held[kind]
