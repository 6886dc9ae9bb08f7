"""The edge that each message of a layer goes along, in the columns of the places `edges` and `edge_ends`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """Messages, or the edges that a layer was called with, as tensors with one number for each.

    Attributes:
        source, target: the nodes that send and receive.
        relation: the type of the edge, or its `code` if below -1; -1 if there is none.
        against: 1 if the layer's flow runs against its edges, else 0.
        nodes: the number of nodes of the layer, -1 if unknown.
        portion: for edges in all layers at once, the index of the edge list that layers were called with.
    """

    source: Int[Tensor, " message"]
    target: Int[Tensor, " message"]
    relation: Int[Tensor, " message"]
    against: Int[Tensor, " message"]
    nodes: Int[Tensor, " message"]
    portion: Int[Tensor, " message"] | None = None

    @classmethod
    def of(cls, rows: Int[Tensor, "message column"]) -> Sent:
        """Invert `rows`."""
        return cls(*rows.unbind(1))

    def rows(self) -> Int[Tensor, "message column"]:
        """One row for each, with the attributes as columns in order; the format of places."""
        return torch.stack(self._columns(), 1)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, chosen: slice | Bool[Tensor, " message"]) -> Sent:
        return Sent(*(column[chosen] for column in self._columns()))

    @functools.cached_property
    def ends(self) -> Int[Tensor, "message 2"]:
        """The two nodes of each edge in the order of the layer's input, whatever its flow."""
        sent = torch.stack([self.source, self.target], 1)
        return torch.where(self.against[:, None] > 0, sent.flip(1), sent)

    def by_relation(self) -> Int[Tensor, "message 3"]:
        """The source, target and relation of each, for `found_in`."""
        return torch.stack([self.source, self.target, self.relation], 1)

    def portions(self) -> list[int | None]:
        """The indices of the edge lists; only None if they are not distinguished."""
        return [None] if self.portion is None else self.portion.unique().tolist()

    def within(self, portion: int | None) -> Bool[Tensor, " message"]:
        """Which of them are in an edge list; for None all are."""
        if portion is None or self.portion is None:
            return torch.ones_like(self.source, dtype=torch.bool)
        return self.portion == portion

    def _columns(self) -> list[Tensor]:
        columns = [getattr(self, field.name) for field in fields(self)]
        return [column for column in columns if column is not None]
