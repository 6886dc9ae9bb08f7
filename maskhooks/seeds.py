"""Seeds: one generator for each purpose, from a seed and numbers such as epoch and step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def seeded(seed: int, *numbers: int) -> int:
    """A seed for one purpose, well mixed from `seed` and the purpose's numbers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator of one's own, on the CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seeded(seed, *numbers))


@contextlib.contextmanager
def forked(model: nn.Module) -> Iterator[None]:
    """Leaves the global random state as it was, of the CPU and of the GPUs that the model stands on."""
    devices = sorted({weight.device.index or 0 for weight in model.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield
