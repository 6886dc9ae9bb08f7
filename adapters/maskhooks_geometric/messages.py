"""The graph that each message belongs to, and the edge of the batch that it goes along."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from maskhooks.sites.units import undirected
from maskhooks_geometric.edges import found_in, rows
from maskhooks_geometric.graphs import Graphs, Relation
from maskhooks_geometric.sent import Sent


class Messages:
    """The messages that a layer sent for a batch.

    Args:
        graphs: the batch.
        sent: the value of a layer's `edges`, or of a model's `edge_ends`.
        relation: the edge type that the layer serves; None if it serves all.
    """

    def __init__(self, graphs: Graphs, sent: Sent, relation: Relation | None) -> None:
        if relation is None:
            sent = _typed(graphs, sent)
        self.graphs, self.sent, self.relation = graphs, sent, relation
        self._several = relation is None and bool(graphs.relations) and bool((sent.relation >= 0).any())

    def graph(self) -> Int[Tensor, " message"] | None:
        """The graph of each message; None if the nodes of the layer are not those of the batch."""
        if self.graphs.single:
            return torch.zeros_like(self.sent.source)
        if self._in_order is not None:
            return self._in_order
        found = self._each(self._graph)
        return None if bool((found < 0).any()) else found

    def columns(self, *, called: bool = True) -> dict[str, Int[Tensor, " message"]]:
        """The columns source, target, edge, and relation if there are several; see `GraphTask.edges`.

        With several node types also source_type and target_type, indices among the types; -1 is unknown.

        Args:
            called: number edges as the batch does (`e_id`); otherwise by their place in their graph.
        """
        found = {
            "source": self._each(lambda relation, sent: _called(self.graphs, relation and relation[0], sent.source)),
            "target": self._each(lambda relation, sent: _called(self.graphs, relation and relation[2], sent.target)),
            "edge": self._each(lambda relation, sent: self._edge(relation, sent, called)),
        }
        if self.relation is not None:
            found["relation"] = torch.full_like(self.sent.relation, self.graphs.relations.index(self.relation))
        elif len(self.sent) and int(self.sent.relation.max()) >= 0:
            found["relation"] = self.sent.relation
        kinds = self.graphs.node_types
        if len(kinds) > 1:
            for name, end in (("source_type", 0), ("target_type", 2)):
                numbers = [kinds.index(relation[end]) for relation in self.graphs.relations]
                relations = found.get("relation", self.sent.relation)
                found[name] = torch.as_tensor([*numbers, -1]).to(relations)[relations]
        return found

    @functools.cached_property
    def _in_order(self) -> Tensor | None:
        """The graph of each message if they go along all of the batch's edges of a type, in order; else None.

        This is the usual case, and avoids the search for their edges.
        """
        adjacency = self.graphs.adjacency(self.relation)
        graph_index = self.graphs.graph_of(self.relation and self.relation[2])
        if self._several or adjacency is None or graph_index is None or not len(self.sent):
            return None
        if self.relation is None and "edge_type" in self.graphs:
            return None
        source, target = rows(adjacency)
        same = torch.equal(self.sent.target, target) and torch.equal(self.sent.source, source)
        if not same or int(self.sent.against.max()) or int(target.max()) >= len(graph_index):
            return None
        return graph_index.index_select(0, target)

    @functools.cached_property
    def undirected(self) -> Int[Tensor, " message"]:
        """A number for each message, the same for both directions between two nodes.

        Two node types, or sets, number their nodes separately, so messages between them are not paired.
        """
        relations, kinds = self.graphs.relations, self.sent.relation
        if self.relation is not None:
            kinds = torch.full_like(kinds, relations.index(self.relation))
        portion = () if self.sent.portion is None else (self.sent.portion,)
        numbers = undirected(self.sent.source, self.sent.target, kinds, *portion)
        apart = isinstance(self.graphs.get("x"), (tuple, list)) or "hyperedge_index" in self.graphs
        if not relations and not apart:
            return numbers
        within = [number for number, (source, _, target) in enumerate(relations) if source == target]
        paired = torch.isin(kinds, torch.tensor(within, dtype=kinds.dtype, device=kinds.device))
        return torch.where(paired, numbers, torch.arange(-len(kinds), 0, device=kinds.device))

    def _each(self, function: Callable[[Relation | None, Sent], Tensor]) -> Tensor:
        """A number for each message, computed for one edge type and one edge list at a time."""
        lists = self.sent.portions()
        if not self._several and len(lists) < 2:
            return function(self.relation, self.sent)
        kinds = list(enumerate(self.graphs.relations)) if self._several else [(None, self.relation)]
        found = torch.full_like(self.sent.source, -1)
        for (number, relation), portion in itertools.product(kinds, lists):
            mine = torch.ones_like(found, dtype=torch.bool) if number is None else self.sent.relation == number
            mine &= self.sent.within(portion)
            found[mine] = function(relation, self.sent[mine])
        return found

    def _graph(self, relation: Relation | None, sent: Sent) -> Tensor:
        """The graph of the receiving node, or of the sending one if the batch lacks the receiver (a hyperedge)."""
        for nodes, kind in ((sent.target, relation and relation[2]), (sent.source, relation and relation[0])):
            graph_index = self.graphs.graph_of(kind)
            if graph_index is None:
                return torch.zeros_like(nodes)
            if self._renumbered(relation, sent):
                break
            if not len(sent) or int(nodes.max()) < len(graph_index):
                return graph_index.index_select(0, nodes)
        return torch.full_like(sent.source, -1)

    def _renumbered(self, relation: Relation | None, sent: Sent) -> bool:
        """Whether the layer's nodes are not the batch's, as after pooling; the first nodes of the batch are."""
        if not len(sent) or int(sent.nodes[0]) in (-1, self.graphs.nodes(relation and relation[0])):
            return False
        given = self.graphs.edges(relation)
        own = sent[sent.source != sent.target].ends
        return given is None or bool((found_in(own, given.to(own)) < 0).any())

    def _edge(self, relation: Relation | None, sent: Sent, called: bool) -> Tensor:
        """The number of each message's edge, -1 if the layer added the edge; see `columns`."""
        if self._in_order is not None:
            return self.graphs.edge_numbers(relation, called)
        given = self.graphs.edges(relation)
        if given is None or not len(given) or self._renumbered(relation, sent):
            return torch.full_like(sent.source, -1)
        own = sent.ends
        own = own.flip(1) if relation is None and _reversed(own, given.to(own)) else own
        types = self.graphs.get("edge_type") if relation is None else None
        if isinstance(types, Tensor) and len(types) == len(given) and bool((sent.relation >= 0).all()):
            own = torch.cat([own, sent.relation[:, None]], 1)
            given = torch.cat([given, types.reshape(-1, 1).to(given)], 1)
        place = found_in(own, given.to(own))
        numbers = self.graphs.edge_numbers(relation, called).to(place)
        return torch.where(place < 0, -1, numbers[place.clamp(min=0)])


def _reversed(edges: Int[Tensor, "edge 2"], given: Int[Tensor, "given 2"]) -> bool:
    """Whether a layer was called with all given edges reversed, in order; self-loops aside."""
    between, known = (part[part[:, 0] != part[:, 1]] for part in (edges, given))
    return torch.equal(between, known.flip(1)) and not torch.equal(between, known)


def _typed(graphs: Graphs, sent: Sent) -> Sent:
    """Fill in the relations of layers that serve one each, from the layers' names or the edges they were called with.

    A batch without edge types has no relations.
    """
    numbers = sent.relation.clone()
    if len(sent) and int(numbers.min()) < -1:
        for known in sent.relation.unique().tolist():
            if known < -1:
                numbers[sent.relation == known] = graphs.codes.get(known, -1)
    pairs = torch.stack([sent.source, sent.target], 1)
    for portion in sent.portions() if graphs.relations and sent.portion is not None else ():
        mine = sent.within(portion) & (numbers < 0)
        for number, relation in enumerate(graphs.relations):
            edges = graphs.edges(relation)
            if edges is not None and edges.shape[0] == int(mine.sum()) and torch.equal(edges, pairs[mine]):
                numbers[mine] = number
                break
    return replace(sent, relation=numbers)


def _called(graphs: Graphs, kind: str | None, nodes: Tensor) -> Tensor:
    """Nodes numbered as in the batch; unchanged if the layer numbers others, such as hyperedges."""
    numbers = graphs.numbers(kind).to(nodes.device)
    if not len(numbers):
        return nodes
    if len(nodes) and int(nodes.max()) < len(numbers):
        return numbers.index_select(0, nodes)
    return torch.where(nodes < len(numbers), numbers[nodes.clamp(max=len(numbers) - 1)], nodes)
