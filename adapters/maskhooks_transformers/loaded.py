"""Finds the types of transformers that the user has imported, without importing it."""

from __future__ import annotations

import sys

from torch import nn


def model_types() -> tuple[type[nn.Module], ...]:
    """`PreTrainedModel`, or nothing if no such model can exist in this process yet."""
    module = sys.modules.get("transformers.modeling_utils")
    found = getattr(module, "PreTrainedModel", None)
    return () if found is None else (found,)
