"""Values at the sites of graph networks, their predictions, and the pairs of nodes that edges join."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import maskhooks
from maskhooks.model.hooked import Hooked
from maskhooks.passes.clean import clean_pass


def values(hooked: Hooked, data: Any, *addresses: str) -> list[Tensor]:
    with torch.no_grad(), hooked.tap(read=list(addresses)) as tap:
        hooked(data)
    return [tap.values[address] for address in addresses]


def pairs(edges: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in edges[:, :2].tolist()]


def outputs(model: Any, data: Any, **settings: Any) -> Any:
    return clean_pass(maskhooks.wrap(model.eval(), **settings), data, []).outputs
