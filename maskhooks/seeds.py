"""Seeds: one generator per purpose, from the random seed and numbers such as epoch and step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def seeded(seed: int, *numbers: int) -> int:
    """Return a seed for one purpose, mixed from `seed` and the purpose's numbers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *numbers: int) -> torch.Generator:
    """Return a new generator, on the CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seeded(seed, *numbers))


@contextlib.contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """Restore the global random state of the CPU and of the model's GPUs on exit."""
    devices = sorted({weight.device.index or 0 for weight in model.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield
