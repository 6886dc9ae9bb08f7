"""Finds the types of TransformerLens that the user has imported, without importing it."""

from __future__ import annotations

import sys

from torch import nn


def bridge_types() -> tuple[type[nn.Module], ...]:
    """`TransformerBridge`, or nothing if none can exist in this process yet."""
    module = sys.modules.get("transformer_lens.model_bridge.transformer_bridge")
    found = getattr(module, "TransformerBridge", None)
    return () if found is None else (found,)
