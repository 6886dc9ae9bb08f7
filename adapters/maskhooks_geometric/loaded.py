"""Finds the types of PyTorch Geometric that the user has imported, without importing it."""

from __future__ import annotations

import sys

from torch import nn


def layer_types() -> tuple[type[nn.Module], ...]:
    """`MessagePassing`, or nothing if no such layer can exist in this process yet."""
    module = sys.modules.get("torch_geometric.nn.conv.message_passing")
    found = getattr(module, "MessagePassing", None)
    return () if found is None else (found,)
