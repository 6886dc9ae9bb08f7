"""Messages: which graph each one belongs to, and which edge of the batch it goes along."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from maskhooks.sites.units import undirected
from maskhooks_geometric.edges import found_in, rows
from maskhooks_geometric.graphs import Graphs, Relation

Sent = Int[Tensor, "message column"]  # what a layer's `edges` gives


class Messages:
    """The messages that a layer has sent for a batch.

    Args:
        graphs: the batch.
        sent: a row of source, target, relation, whether the flow is against the edges, and how many nodes the layer
            has; of edges in all layers also which of the lists of edges that layers were called with it is of, and the
            relation may be a `code`.
        relation: the type of edges that the layer serves; None where it serves all.
    """

    def __init__(self, graphs: Graphs, sent: Sent, relation: Relation | None) -> None:
        if relation is None:
            sent = _typed(graphs, sent)
        self.graphs, self.sent, self.relation = graphs, sent, relation
        self._several = relation is None and bool(graphs.relations) and bool((sent[:, 2] >= 0).any())

    def graph(self) -> Int[Tensor, " message"] | None:
        """The graph of each; None where the layer has other nodes than the batch."""
        if self.graphs.single:
            return torch.zeros_like(self.sent[:, 0])
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
            "source": self._each(lambda relation, sent: _called(self.graphs, relation and relation[0], sent[:, 0])),
            "target": self._each(lambda relation, sent: _called(self.graphs, relation and relation[2], sent[:, 1])),
            "edge": self._each(lambda relation, sent: self._edge(relation, sent, called)),
        }
        if self.relation is not None:
            found["relation"] = torch.full_like(self.sent[:, 2], self.graphs.relations.index(self.relation))
        elif len(self.sent) and int(self.sent[:, 2].max()) >= 0:
            found["relation"] = self.sent[:, 2]
        kinds = self.graphs.node_types
        if len(kinds) > 1:
            for name, end in (("source_type", 0), ("target_type", 2)):
                numbers = [kinds.index(relation[end]) for relation in self.graphs.relations]
                found[name] = torch.as_tensor([*numbers, -1]).to(self.sent)[found.get("relation", self.sent[:, 2])]
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
        same = torch.equal(self.sent[:, 1], target) and torch.equal(self.sent[:, 0], source)
        if not same or int(self.sent[:, 3].max()) or int(target.max()) >= len(whose):
            return None
        return whose.index_select(0, target)

    @functools.cached_property
    def undirected(self) -> Int[Tensor, " message"]:
        """A number for each, the same for those between the same two nodes in both directions.

        Nodes of two types, or of two sets, have numbers of their own, so that messages between them are alone.
        """
        relations, kinds = self.graphs.relations, self.sent[:, 2]
        if self.relation is not None:
            kinds = torch.full_like(kinds, relations.index(self.relation))
        numbers = undirected(self.sent[:, 0], self.sent[:, 1], kinds, *self.sent[:, 5:].unbind(1))
        apart = isinstance(self.graphs.get("x"), (tuple, list)) or "hyperedge_index" in self.graphs
        if not relations and not apart:
            return numbers
        within = [number for number, (source, _, target) in enumerate(relations) if source == target]
        paired = torch.isin(kinds, torch.tensor(within, dtype=kinds.dtype, device=kinds.device))
        return torch.where(paired, numbers, torch.arange(-len(kinds), 0, device=kinds.device))

    def _each(self, function: Callable[[Relation | None, Sent], Tensor]) -> Tensor:
        """A number for each message, from those of one type of edges and one list of edges at a time."""
        lists = self.sent[:, 5:].unique().tolist() if self.sent.shape[1] > 5 else []
        if not self._several and len(lists) < 2:
            return function(self.relation, self.sent)
        kinds = list(enumerate(self.graphs.relations)) if self._several else [(None, self.relation)]
        found = torch.full_like(self.sent[:, 0], -1)
        for (number, relation), portion in itertools.product(kinds, lists or [None]):
            mine = torch.ones_like(found, dtype=torch.bool) if number is None else self.sent[:, 2] == number
            mine = mine if portion is None else mine & (self.sent[:, 5] == portion)
            found[mine] = function(relation, self.sent[mine])
        return found

    def _graph(self, relation: Relation | None, sent: Sent) -> Tensor:
        """By the node that receives; where that is none of the batch's, as a hyperedge, by the one that sends."""
        for column, kind in ((1, relation and relation[2]), (0, relation and relation[0])):
            whose = self.graphs.graph_of(kind)
            if whose is None:
                return torch.zeros_like(sent[:, 0])
            if self._renumbered(relation, sent):
                break
            if not len(sent) or int(sent[:, column].max()) < len(whose):
                return whose.index_select(0, sent[:, column])
        return torch.full_like(sent[:, 0], -1)

    def _renumbered(self, relation: Relation | None, sent: Sent) -> bool:
        """Whether the layer has other nodes than the batch, as after pooling; not where it has the first of them."""
        if not len(sent) or int(sent[0, 4]) in (-1, self.graphs.nodes(relation and relation[0])):
            return False
        given = self.graphs.edges(relation)
        between = sent[sent[:, 0] != sent[:, 1]]
        own = torch.where(between[:, 3:4] > 0, between[:, :2].flip(1), between[:, :2])
        return given is None or bool((found_in(own, given.to(own)) < 0).any())

    def _edge(self, relation: Relation | None, sent: Sent, called: bool) -> Tensor:
        """The number of each message's edge, -1 where the layer added it; see `columns`."""
        if self._in_order is not None:
            return self.graphs.edge_numbers(relation, called)
        given = self.graphs.edges(relation)
        if given is None or not len(given) or self._renumbered(relation, sent):
            return torch.full_like(sent[:, 0], -1)
        own = torch.where(sent[:, 3:4] > 0, sent[:, :2].flip(1), sent[:, :2])
        own = own.flip(1) if relation is None and _reversed(own, given.to(own)) else own
        types = self.graphs.get("edge_type") if relation is None else None
        if isinstance(types, Tensor) and len(types) == len(given) and bool((sent[:, 2] >= 0).all()):
            own, given = torch.cat([own, sent[:, 2:3]], 1), torch.cat([given, types.reshape(-1, 1).to(given)], 1)
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
    if len(sent) and int(sent[:, 2].min()) < -1:
        numbers = sent[:, 2].clone()
        for known in sent[:, 2].unique().tolist():
            if known < -1:
                numbers[sent[:, 2] == known] = graphs.codes.get(known, -1)
        sent = torch.cat([sent[:, :2], numbers[:, None], sent[:, 3:]], 1)
    if not graphs.relations:
        return sent
    sent = sent.clone()
    for portion in sent[:, 5:].unique().tolist():
        mine = (sent[:, 5] == portion) & (sent[:, 2] < 0)
        for number, relation in enumerate(graphs.relations):
            edges = graphs.edges(relation)
            if edges is not None and edges.shape[0] == int(mine.sum()) and torch.equal(edges, sent[mine, :2]):
                sent[mine, 2] = number
                break
    return sent


def _called(graphs: Graphs, kind: str | None, nodes: Tensor) -> Tensor:
    """Nodes as the batch calls them; as they are where the layer numbers others, such as hyperedges."""
    numbers = graphs.numbers(kind).to(nodes.device)
    if not len(numbers):
        return nodes
    if len(nodes) and int(nodes.max()) < len(numbers):
        return numbers.index_select(0, nodes)
    return torch.where(nodes < len(numbers), numbers[nodes.clamp(max=len(numbers) - 1)], nodes)
