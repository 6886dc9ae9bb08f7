"""Placement: where a model is while it is used."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model to a device, and back on exit; a model spread over several devices stays where it is."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) != 1 or devices == {device}:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(devices.pop())
