"""Seeds: one generator for each purpose, from a seed and numbers such as epoch and step."""

from __future__ import annotations

import numpy as np
import torch


def seeded(seed: int, *numbers: int) -> int:
    """A seed for one purpose, well mixed from `seed` and the purpose's numbers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator of one's own, on the CPU so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seeded(seed, *numbers))
