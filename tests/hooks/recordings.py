"""Recordings of one pass through a tiny model, and counts of what computes when one is played."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskhooks.hooks.replay import Recording, Replay
from maskhooks.sites.site import Site


class Count:
    """Counts how often a module's own forward computes (a replaced one does not count)."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        forward = type(module).forward

        def counted(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(this, *args, **kwargs)

        module.__class__ = type(type(module).__name__, (type(module),), {"forward": counted})


def run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def recorded(model: nn.Module, batch: Any, *sites: Site) -> tuple[Replay, Recording, Any]:
    replay = Replay(model)
    replay.trace(lambda: run(model, batch))
    with torch.no_grad(), replay.record(sites) as recording:
        outputs = run(model, batch)
    return replay, recording, outputs


def tensor(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return found
