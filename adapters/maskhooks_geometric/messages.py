"""Messages: which graph each one belongs to, and which edge of the batch it goes along."""

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
    """The messages that a layer has sent for a batch.

    Args:
        graphs: the batch.
        sent: what a layer's `edges`, or a model's `edge_ends`, gives.
        relation: the type of edges that the layer serves; None where it serves all.
    """

    def __init__(self, graphs: Graphs, sent: Sent, relation: Relation | None) -> None:
        if relation is None:
            sent = _typed(graphs, sent)
        self.graphs, self.sent, self.relation = graphs, sent, relation
        self._several = relation is None and bool(graphs.relations) and bool((sent.relation >= 0).any())

    def graph(self) -> Int[Tensor, " message"] | None:
        """The graph of each; None where the layer has other nodes than the batch."""
        if self.graphs.single:
            return torch.zeros_like(self.sent.source)
        if self._in_order is not None:
            return self._in_order
        found = self._each(self._graph)
        return None if bool((found < 0).any()) else found

    def columns(self, *, called: bool = True) -> dict[str, Int[Tensor, " message"]]:
        """source, target, relation where there are several, and edge; see `GraphTask.edges`.

        Where nodes are of several types, also source_type and target_type, their numbers among these; -1 is unknown.

        Args:
            called: edges as the batch calls them; else by their place in their graph.
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
        """The graph of each where they go along the batch's edges of a kind, all of these in their order; else None.

        This is the usual case, and saves what is needed to find their edges.
        """
        adjacency = self.graphs.adjacency(self.relation)
        whose = self.graphs.graph_of(self.relation and self.relation[2])
        if self._several or adjacency is None or whose is None or not len(self.sent):
            return None
        if self.relation is None and "edge_type" in self.graphs:
            return None
        source, target = rows(adjacency)
        same = torch.equal(self.sent.target, target) and torch.equal(self.sent.source, source)
        if not same or int(self.sent.against.max()) or int(target.max()) >= len(whose):
            return None
        return whose.index_select(0, target)

    @functools.cached_property
    def undirected(self) -> Int[Tensor, " message"]:
        """A number for each, the same for those between the same two nodes in both directions.

        Nodes of two types, or of two sets, have numbers of their own, so that messages between them are alone.
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
        """A number for each message, from those of one type of edges and one list of edges at a time."""
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
        """By the node that receives; where that is none of the batch's, as a hyperedge, by the one that sends."""
        for nodes, kind in ((sent.target, relation and relation[2]), (sent.source, relation and relation[0])):
            whose = self.graphs.graph_of(kind)
            if whose is None:
                return torch.zeros_like(nodes)
            if self._renumbered(relation, sent):
                break
            if not len(sent) or int(nodes.max()) < len(whose):
                return whose.index_select(0, nodes)
        return torch.full_like(sent.source, -1)

    def _renumbered(self, relation: Relation | None, sent: Sent) -> bool:
        """Whether the layer has other nodes than the batch, as after pooling; not where it has the first of them."""
        if not len(sent) or int(sent.nodes[0]) in (-1, self.graphs.nodes(relation and relation[0])):
            return False
        given = self.graphs.edges(relation)
        own = sent[sent.source != sent.target].ends
        return given is None or bool((found_in(own, given.to(own)) < 0).any())

    def _edge(self, relation: Relation | None, sent: Sent, called: bool) -> Tensor:
        """The number of each message's edge, -1 where the layer added it; see `columns`."""
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
    """Whether a layer was called with all given edges the other way round, in their order; self-loops aside."""
    between, known = (part[part[:, 0] != part[:, 1]] for part in (edges, given))
    return torch.equal(between, known.flip(1)) and not torch.equal(between, known)


def _typed(graphs: Graphs, sent: Sent) -> Sent:
    """The same with relations where layers serve one each, told by the layers' names, or by what they were called with.

    Without types of edges there are none.
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
    """Nodes as the batch calls them; as they are where the layer numbers others, such as hyperedges."""
    numbers = graphs.numbers(kind).to(nodes.device)
    if not len(numbers):
        return nodes
    if len(nodes) and int(nodes.max()) < len(numbers):
        return numbers.index_select(0, nodes)
    return torch.where(nodes < len(numbers), numbers[nodes.clamp(max=len(numbers) - 1)], nodes)
