"""Small graph networks and graphs for the tests of the adapter of PyTorch Geometric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.nn import GATConv, GCNConv, HeteroConv, RGCNConv, SAGEConv, global_add_pool

# A self-loop at 3, and an edge 2 -> 0 that occurs twice.
EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 2], [1, 2, 0, 3, 4, 0, 0]])
TYPES = torch.tensor([2, 0, 1, 0, 2, 1, 0])
RELATIONS = [("user", "rates", "film"), ("film", "rated_by", "user"), ("user", "knows", "user")]


def randn(*shape: int) -> Tensor:
    """The same numbers each time, and none of the global generator's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def graph(nodes: int = 5, edges: Tensor = EDGES, **more: Any) -> Data:
    return Data(x=randn(nodes, 3), edge_index=edges, y=torch.tensor([nodes % 2]), **more)


def batch() -> Batch:
    """Three graphs, the last with edges in another order."""
    return Batch.from_data_list([graph(), graph(3, EDGES[:, :3]), graph(6, EDGES.flip(1))])


def hetero() -> HeteroData:
    data = HeteroData()
    data["user"].x, data["film"].x = randn(4, 3), randn(3, 3)
    data["user", "rates", "film"].edge_index = torch.tensor([[0, 1, 3, 3], [0, 0, 1, 2]])
    data["film", "rated_by", "user"].edge_index = torch.tensor([[0, 0, 2], [1, 2, 0]])
    data["user", "knows", "user"].edge_index = torch.tensor([[0, 1], [1, 0]])
    data["user"].y = torch.tensor([0, 1, 1, 0])
    return data


class Pooled(nn.Module):
    """Two layers and a prediction for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(3, 8), GATConv(8, 4, heads=2)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Any, batch: Tensor | None = None) -> Tensor:
        hidden = self.first(x, edge_index).relu()
        pooled: Tensor = self.last(global_add_pool(self.second(hidden, edge_index).relu(), batch))
        return pooled


class Nodes(nn.Module):
    """A prediction for each node, with a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = SAGEConv(3, 6), SAGEConv(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        hidden = self.first(x, edge_index).tanh()
        hidden = self.again(hidden, edge_index).tanh()
        predicted: Tensor = self.last(self.again(hidden, edge_index).tanh())
        return predicted


class Relational(nn.Module):
    """R-GCN, which calls `propagate` once for each relation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = RGCNConv(3, 6, num_relations=3), nn.Linear(6, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor, batch: Tensor | None = None) -> Tensor:
        pooled: Tensor = self.last(global_add_pool(self.conv(x, edge_index, edge_type).relu(), batch))
        return pooled


class Typed(nn.Module):
    """HeteroConv: a layer for each relation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = HeteroConv({key: SAGEConv((3, 3), 6) for key in RELATIONS})
        self.last = nn.Linear(6, 2)

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        predicted: Tensor = self.last(self.conv(x_dict, edge_index_dict)["user"].relu())
        return predicted


class Links(nn.Module):
    """A number for each pair of nodes in question."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SAGEConv(3, 6), SAGEConv(6, 6)

    def forward(self, x: Tensor, edge_index: Tensor, edge_label_index: Tensor) -> Tensor:
        states = self.second(self.first(x, edge_index).tanh(), edge_index)
        return (states[edge_label_index[0]] * states[edge_label_index[1]]).sum(-1)


class Rates(nn.Module):
    """Whether a user rates a film."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = HeteroConv({key: SAGEConv((3, 3), 6) for key in RELATIONS})

    def forward(self, x_dict: Any, edge_index_dict: Any, edge_label_index: Tensor) -> Tensor:
        states = self.conv(x_dict, edge_index_dict)
        return (states["user"][edge_label_index[0]] * states["film"][edge_label_index[1]]).sum(-1)
