"""What of PyTorch Geometric the user has loaded; nothing here imports it."""

from __future__ import annotations

import sys

from torch import nn


def layer_types() -> tuple[type[nn.Module], ...]:
    """`MessagePassing`, or nothing while no such layer can exist in this process."""
    module = sys.modules.get("torch_geometric.nn.conv.message_passing")
    found = getattr(module, "MessagePassing", None)
    return () if found is None else (found,)
