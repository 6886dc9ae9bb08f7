"""The nodes that an adjacency of any format connects, and the edges that two lists share."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from maskhooks.errors import BatchError
from maskhooks.sites.example_index import ExampleIndex

Ends = tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]


def rows(adjacency: Any) -> Ends:
    """The two rows of an edge_index, int64; the columns come first for a sparse adjacency, which is transposed.

    Raises:
        BatchError: the layout of a sparse tensor is not supported.
    """
    if not isinstance(adjacency, Tensor):  # torch_sparse's
        target, source, _ = adjacency.coo()
        return source, target
    if adjacency.layout == torch.strided:
        plain = adjacency.as_subclass(Tensor).long()  # layers accept narrower integers, scatter sums do not
        return plain[0], plain[1]
    if adjacency.layout == torch.sparse_coo:
        target, source = adjacency._indices()
        return source, target
    if adjacency.layout == torch.sparse_csr:
        counts = adjacency.crow_indices().diff()
        numbers = torch.arange(len(counts), device=counts.device)
        return adjacency.col_indices().long(), numbers.repeat_interleave(counts)
    raise BatchError(
        f"the adjacency has the layout {adjacency.layout}, with which a layer cannot compute separate messages. Give "
        "an edge_index, or another layout: adj_t.to_sparse_csr()"
    )


def weighted(adjacency: Any) -> bool:
    """Whether a sparse torch tensor has values other than 1."""
    if not isinstance(adjacency, Tensor) or adjacency.layout == torch.strided:
        return False
    values = adjacency._values() if adjacency.layout == torch.sparse_coo else adjacency.values()
    return bool((values != 1).any())


def ends(adjacency: Any, flow: str) -> Ends:
    """The sending and the receiving node of each message."""
    first, second = rows(adjacency)
    return (first, second) if flow == "source_to_target" else (second, first)


def found_in(edges: Int[Tensor, "edge column"], known: Int[Tensor, "known column"]) -> Int[Tensor, " edge"]:
    """The index of each edge among the known ones, -1 if it is not among them.

    Repeated edges are paired in order. Once all known edges between two nodes are paired, pairing starts over, as in
    the next hop or use of a layer; but surplus self-loops get -1, because the layer may have added them.
    """
    count, looped = len(known), edges[:, 0] == edges[:, 1]
    if len(edges) >= count and torch.equal(edges[:count], known) and bool(looped[count:].all()):  # the usual case
        found = torch.arange(len(edges), device=edges.device)
        return found if len(edges) == count else found.masked_fill(found >= count, -1)
    if not count or not len(edges):
        return torch.full_like(edges[:, 0], -1)
    _, kinds = torch.unique(_numbered(torch.cat([known, edges])), return_inverse=True)
    times = len(kinds) + 1
    here, there = (ExampleIndex(part, times).places() for part in (kinds[count:], kinds[:count]))
    often = torch.bincount(kinds[:count], minlength=len(kinds))[kinds[count:]].clamp(min=1)
    here = kinds[count:] * times + torch.where(looped, here, here % often)
    ordered, order = (kinds[:count] * times + there).sort()
    place = torch.searchsorted(ordered, here).clamp(max=count - 1)
    return torch.where(ordered[place] == here, order[place], -1)


def _numbered(edges: Int[Tensor, "edge column"]) -> Int[Tensor, " edge"]:
    """A number for each row, the same for equal rows."""
    low = edges.amin(0)
    sizes = edges.amax(0) - low + 1
    number = torch.zeros_like(edges[:, 0])
    for column in range(edges.shape[1]):
        number = number * sizes[column] + edges[:, column] - low[column]
    return number
