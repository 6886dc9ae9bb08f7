"""What transformers predict for a batch, as the distribution that a test expects."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import Categorical

from maskhooks import Hooked
from maskhooks.model.outputs import Outputs, Positions


def predict(hooked: Hooked, given: Any) -> tuple[Any, Outputs]:
    hooked.model.eval()
    with torch.no_grad():
        outputs = hooked(given)
        return outputs, hooked.distribution(outputs, given)


def categorical(part: object) -> Categorical:
    assert isinstance(part, Categorical)
    return part


def positions(part: object) -> Positions:
    assert isinstance(part, Positions)
    return part
