"""Sent: along which edge each message of a layer goes, as the places `edges` and `edge_ends` give it in columns."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """Messages, or the edges that a layer was called with, in tensors with a number for each.

    Attributes:
        source, target: the nodes that send and that receive.
        relation: the type of the edge, or below -1 a `code` of it; -1 where there is none.
        against: 1 where the layer's flow is against its edges, else 0.
        nodes: how many nodes the layer has, -1 where it is not known.
        portion: of edges in all layers at once, which of the lists of edges that layers were called with.
    """

    source: Int[Tensor, " message"]
    target: Int[Tensor, " message"]
    relation: Int[Tensor, " message"]
    against: Int[Tensor, " message"]
    nodes: Int[Tensor, " message"]
    portion: Int[Tensor, " message"] | None = None

    @classmethod
    def of(cls, rows: Int[Tensor, "message column"]) -> Sent:
        """The inverse of `rows`."""
        return cls(*rows.unbind(1))

    def rows(self) -> Int[Tensor, "message column"]:
        """A row for each, with the attributes as columns in their order, as a place takes it."""
        return torch.stack(self._columns(), 1)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, chosen: slice | Bool[Tensor, " message"]) -> Sent:
        return Sent(*(column[chosen] for column in self._columns()))

    @functools.cached_property
    def ends(self) -> Int[Tensor, "message 2"]:
        """The two nodes of each edge in the order in which the layer was given them, whatever its flow."""
        sent = torch.stack([self.source, self.target], 1)
        return torch.where(self.against[:, None] > 0, sent.flip(1), sent)

    def by_relation(self) -> Int[Tensor, "message 3"]:
        """Source, target and relation of each, for `found_in`."""
        return torch.stack([self.source, self.target, self.relation], 1)

    def portions(self) -> list[int | None]:
        """The numbers of the lists of edges there are; None alone where they are not told apart."""
        return [None] if self.portion is None else self.portion.unique().tolist()

    def within(self, portion: int | None) -> Bool[Tensor, " message"]:
        """Which of them are in a list of edges; all in None."""
        if portion is None or self.portion is None:
            return torch.ones_like(self.source, dtype=torch.bool)
        return self.portion == portion

    def _columns(self) -> list[Tensor]:
        columns = [getattr(self, field.name) for field in fields(self)]
        return [column for column in columns if column is not None]
