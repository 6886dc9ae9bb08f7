"""What of transformers the user has loaded; nothing here imports it."""

from __future__ import annotations

import sys

from torch import nn


def model_types() -> tuple[type[nn.Module], ...]:
    """`PreTrainedModel`, or nothing while no model of transformers can exist in this process."""
    module = sys.modules.get("transformers.modeling_utils")
    found = getattr(module, "PreTrainedModel", None)
    return () if found is None else (found,)
