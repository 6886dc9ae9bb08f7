"""Opens `pyramid://8` on the command line: a pyramid of that width, with batches."""

from __future__ import annotations

import re

import torch
from torch import nn

import maskhooks
from maskhooks.errors import ModelError
from maskhooks.model.source import Opened, Source

_FORM = re.compile(r"pyramid://(\d+)")


class PyramidSource(Source):
    """A pyramid of random weights over random numbers, the same ones each time."""

    form = "pyramid://WIDTH, a pyramid of that width from 8"

    def claims(self, model: str) -> bool:
        return model.startswith("pyramid://")

    def open(self, model: str, *, max_length: int = 128) -> Opened:
        from maskhooks_example.pyramid import Pyramid  # loaded for those who open one

        found = _FORM.fullmatch(model)
        if found is None or int(found[1]) < 8:
            raise ModelError(f"{model} is no pyramid. Write pyramid://WIDTH with a width from 8.")
        width = int(found[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, numbers = Pyramid(width), torch.randn(12, 32, width)
            for storey in network.storeys:
                nn.init.orthogonal_(storey.weight, gain=2)  # so that the top moves with each number
                nn.init.zeros_(storey.bias)
        hooked = maskhooks.wrap(network, example=numbers[0])
        return Opened(hooked, train=list(numbers[:8]), validation=list(numbers[8:]))
