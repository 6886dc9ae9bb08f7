"""Batches as NeighborLoader and LinkNeighborLoader give them, without the compiled libraries that these need.

The loaders are PyTorch Geometric's own; what they are given to sample with is in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader.link_loader import LinkLoader
from torch_geometric.loader.node_loader import NodeLoader
from torch_geometric.sampler import BaseSampler, HeteroSamplerOutput, SamplerOutput


class Around(BaseSampler):
    """All neighbours of the nodes asked about, hop by hop.

    Args:
        data: the graph.
        hops: how far.
        disjoint: whether each node asked about has neighbours of its own.
    """

    def __init__(self, data: Data | HeteroData, hops: int = 2, disjoint: bool = False) -> None:
        self.hops, self.disjoint, self.hetero = hops, disjoint, isinstance(data, HeteroData)
        self.edges = data.edge_index_dict if isinstance(data, HeteroData) else {("", "", ""): data.edge_index}
        self.kinds = data.node_types if isinstance(data, HeteroData) else [""]

    @property
    def edge_permutation(self) -> None:
        return None

    def sample_from_nodes(self, index: Any, **_: Any) -> Any:
        seeds = list(enumerate(index.node.tolist())) if self.disjoint else [(0, node) for node in index.node.tolist()]
        found, _ = self._sample({index.input_type or "": seeds})
        found.metadata = (index.input_id, index.time)
        return found

    def sample_from_edges(self, index: Any, neg_sampling: Any = None) -> Any:
        trees = range(len(index.row)) if self.disjoint else [0] * len(index.row)
        first, _, last = index.input_type or ("", "", "")
        rows, columns = (list(zip(trees, ends.tolist(), strict=True)) for ends in (index.row, index.col))
        seeds: dict[str, list[tuple[int, int]]] = {first: [*rows]}
        seeds[last] = [*seeds.get(last, []), *columns]
        found, number = self._sample({kind: list(dict.fromkeys(nodes)) for kind, nodes in seeds.items()})
        pairs = torch.tensor([[number[first][node] for node in rows], [number[last][node] for node in columns]])
        found.metadata = (index.input_id, pairs, index.label, None)
        return found

    def _sample(self, seeds: dict[str, list[tuple[int, int]]]) -> tuple[Any, dict[str, dict[tuple[int, int], int]]]:
        """The sample, and which number a node of a tree has in it."""
        nodes = {kind: {node: n for n, node in enumerate(seeds.get(kind, []))} for kind in self.kinds}
        kept: dict[Any, list[tuple[int, int, int]]] = {relation: [] for relation in self.edges}
        front = {kind: list(known) for kind, known in nodes.items()}
        for _ in range(self.hops):
            before, front = front, {kind: [] for kind in self.kinds}
            for relation, edges in self.edges.items():
                for tree, target in before[relation[2]]:
                    for edge in (edges[1] == target).nonzero()[:, 0].tolist():
                        source = (tree, int(edges[0, edge]))
                        if source not in nodes[relation[0]]:
                            nodes[relation[0]][source] = len(nodes[relation[0]])
                            front[relation[0]].append(source)
                        kept[relation].append((nodes[relation[0]][source], nodes[relation[2]][tree, target], edge))
        return self._output(nodes, kept), nodes

    def _output(self, nodes: dict[str, Any], kept: dict[Any, Any]) -> SamplerOutput | HeteroSamplerOutput:
        columns = {key: torch.tensor(rows, dtype=torch.long).reshape(-1, 3).unbind(1) for key, rows in kept.items()}
        row, col, edge = ({key: part[n] for key, part in columns.items()} for n in range(3))
        pairs = {kind: torch.tensor([*known], dtype=torch.long).reshape(-1, 2) for kind, known in nodes.items()}
        trees, node = ({kind: part[:, n] for kind, part in pairs.items()} for n in range(2))
        if self.hetero:
            return HeteroSamplerOutput(node, row, col, edge, trees if self.disjoint else None)
        key = next(iter(columns))
        return SamplerOutput(node[""], row[key], col[key], edge[key], trees[""] if self.disjoint else None)


def around_nodes(data: Any, nodes: Any, size: int = 2, **settings: Any) -> list[Any]:
    """Batches around nodes, so many in each."""
    loader = NodeLoader(data, Around(data, **settings), input_nodes=nodes, batch_size=size)
    return [loader(part) for part in torch.arange(len(loader.input_data.node)).split(size)]


def around_links(data: Any, pairs: Any, labels: Tensor, size: int = 2, **settings: Any) -> list[Any]:
    """Batches around pairs of nodes, so many in each."""
    loader = LinkLoader(
        data, Around(data, **settings), edge_label_index=pairs, edge_label=labels, batch_size=size, neg_sampling=None
    )
    return [loader(part) for part in torch.arange(len(labels)).split(size)]
