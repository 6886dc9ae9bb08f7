"""Graphs: what a batch says of its graphs, whether it is PyG's data object, a mapping, or a call's arguments."""

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
    """A number below -1 for the type of edges that PyG has put into the name of a layer; None where it has put none."""
    return next((_code(ends) for part in name.split(".") if (ends := _ends(part))), None)


def untyped(name: str) -> str:
    """The name of a layer without the type of edges, which those that serve the other types have in common."""
    return ".".join("*" if _ends(part) else part for part in name.split("."))


def _ends(part: str) -> list[str]:
    """The words of a type of edges that a part of a name is; empty for any other."""
    found = [end for end in re.split("_{2,}", part.strip("<>")) if end]
    return found if len(found) > 2 else []


def _code(ends: Sequence[str]) -> int:
    return -2 - zlib.crc32(re.sub(r"[^0-9A-Za-z]+", "_", "_".join(ends)).encode())


class Graphs:
    """One or several graphs that a model takes as one, as they are when they are first asked about.

    Args:
        batch: `Data`, `HeteroData` or a batch of them, a mapping, or a tuple of arguments.
        parameters: the names of the model's arguments, for a tuple.
        pairs: `batch -> nodes`, two rows: those that predictions for links are about.
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
        self._whose: dict[str | None, Tensor | None] = {}
        self._called: dict[str | None, Tensor] = {}

    @functools.cached_property
    def hetero(self) -> bool:
        """Whether there are several types of nodes or edges."""
        return hasattr(self._held, "node_types") or isinstance(self.get("x_dict"), Mapping)

    def get(self, name: str) -> Any:
        """What the batch has under a name; None where it has nothing."""
        if isinstance(self._held, Mapping):
            return self._held.get(name)
        try:
            found = getattr(self._held, name, None)
            return None if inspect.ismethod(found) else found  # as `size`, which a layer takes and a graph computes
        except KeyError:  # HeteroData's, for a name that ends in _dict or weights of no type
            return None

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    @functools.cached_property
    def relations(self) -> list[Relation]:
        """The types of edges, in order; empty where there is one."""
        if not self.hetero:
            return []
        found = self.get("edge_types")
        return list(self.get("edge_index_dict") or () if found is None else found)

    @functools.cached_property
    def codes(self) -> dict[int, int]:
        """The numbers of the types of edges by their `code`."""
        return {_code(relation): number for number, relation in enumerate(self.relations)}

    @functools.cached_property
    def node_types(self) -> list[str]:
        if not self.hetero:
            return []
        found = self.get("node_types")
        return list(self.get("x_dict") or () if found is None else found)

    def adjacency(self, relation: Relation | None = None) -> Any:
        """The edges of a relation, or of the only one: an edge_index or a sparse adjacency; None without any."""
        for name in ("edge_index", "adj_t"):
            found = self.get(name) if relation is None else (self.get(f"{name}_dict") or {}).get(relation)
            if found is not None:
                return found
        return None

    def edges(self, relation: Relation | None = None) -> Int[Tensor, "edge 2"] | None:
        """The pairs of nodes of the edges, in their order."""
        adjacency = self.adjacency(relation)
        return None if adjacency is None else torch.stack(rows(adjacency), 1)

    @functools.cached_property
    def connected(self) -> bool:
        """Whether there is an edge, of any of several types."""
        return any(edges is not None and len(edges) > 0 for edges in map(self.edges, self.relations))

    def nodes(self, kind: str | None = None) -> int:
        """How many nodes there are, of one type or of the only one."""
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
        """The nodes that predictions for links are about; None where the batch names none.

        Raises:
            BatchError: those given are not two rows of whole numbers.
        """
        found = self.for_links("edge_label_index") if self._pairs is None else torch.as_tensor(self._pairs(self.batch))
        if found is not None and (found.dim() != 2 or len(found) != 2 or found.is_floating_point()):
            raise BatchError(
                f"the pairs of nodes that predictions are about have shape {list(found.shape)} and type {found.dtype}: "
                "give two rows of whole numbers, as edge_label_index has, or wrap(model, pairs=lambda batch: ...)"
            )
        return found

    def for_links(self, name: str) -> Tensor | None:
        """What the batch has under a name for the links in question, of the only type of edges that has any."""
        held = self.get(name)
        if held is None and self.hetero:
            held = self.get(f"{name}_dict")
        if isinstance(held, Mapping):
            held = next(iter(held.values())) if len(held) == 1 else None
        return held if isinstance(held, Tensor) else None

    def graph_of_links(self) -> Int[Tensor, " link"] | None:
        """The number of the graph of each pair; None where there is one graph."""
        if self.pairs is None or self.single:
            return None
        typed = self.get("edge_label_index_dict") if self.hetero and self._pairs is None else None
        kinds = [relation[0] for relation in typed] if isinstance(typed, Mapping) else []
        whose = self.graph_of(kinds[0] if kinds else None)
        if whose is None:
            raise BatchError(
                f"the batch holds {self.count} graphs, and it is not known of which type the nodes of each pair are. "
                "Name the pairs in one type of edges: data['user', 'rates', 'film'].edge_label_index"
            )
        return whose[self.pairs[0]]

    @functools.cached_property
    def seeds(self) -> tuple[str | None, int] | None:
        """The type of nodes that a loader began to sample with, and how many: the first ones; None where it did not."""
        kinds: list[str | None] = [*self.node_types] or [None]
        for kind in kinds:
            store = self.store(kind)
            count = getattr(store, "batch_size", None)
            if isinstance(count, int) and isinstance(getattr(store, "n_id", None), Tensor):
                return kind, count
        return None

    def graph_of(self, kind: str | None = None) -> Int[Tensor, " node"] | None:
        """The number of each node's graph; None where there is one graph."""
        if kind not in self._whose:
            self._whose[kind] = self._graph_of(kind)
        return self._whose[kind]

    def _graph_of(self, kind: str | None) -> Int[Tensor, " node"] | None:
        held = getattr(self.store(kind), "batch", None) if kind is not None else self.get("batch")
        return held if isinstance(held, Tensor) else None

    @functools.cached_property
    def single(self) -> bool:
        """Whether there is one graph.

        Raises:
            BatchError: there are several, and nothing says which of them each node is of.
        """
        several = self.count > 1
        kinds: list[str | None] = [*self.node_types] or [None]
        if several and all(self.graph_of(kind) is None for kind in kinds):
            raise BatchError(
                f"the batch holds {self.count} graphs, and no `batch` that says which of them each node is of. Make it "
                "with torch_geometric.data.Batch.from_data_list, or say it: wrap(model, example_index=...)"
            )
        return not several

    @functools.cached_property
    def count(self) -> int:
        """How many graphs there are.

        Raises:
            BatchError: it cannot be said.
        """
        known = self.get("num_graphs")
        if isinstance(known, int):
            return known
        index = self.get("batch")
        if index is None and self.hetero:  # sampled around each node by itself
            several = [whose for kind in self.node_types if (whose := self.graph_of(kind)) is not None and len(whose)]
            return max((int(whose.max()) + 1 for whose in several), default=1)
        if index is None:
            return 1
        if not isinstance(index, Tensor):
            raise BatchError(f"`batch` says which graph each node belongs to, and is a tensor; got {type(index)}")
        return int(index.max()) + 1 if len(index) else 1

    def numbers(self, kind: str | None = None) -> Int[Tensor, " node"]:
        """What each node is called: its number in the graph that it was sampled from, or within its own graph."""
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
        """What each edge is called: its number in the graph that it was sampled from, or its place in its own graph.

        Args:
            called: False for places, whatever it was sampled from.
        """
        store = self.store(relation)
        known = getattr(store, "e_id", None) if store is not None else self.get("e_id")
        ends = rows(self.adjacency(relation))[1]
        if called and isinstance(known, Tensor) and len(known) == len(ends):
            return known
        whose = self.graph_of(relation and relation[2])
        return (
            torch.arange(len(ends), device=ends.device)
            if whose is None
            else ExampleIndex(whose.index_select(0, ends), self.count).places()
        )

    def store(self, kind: str | Relation | None) -> Any:
        """What holds the nodes or edges of a type, or of the only one; None in a mapping."""
        if isinstance(self._held, Mapping):
            return None
        return self._held if kind is None else self._held[kind]
