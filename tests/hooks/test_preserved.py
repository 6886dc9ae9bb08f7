"""Buffers and the random state come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.hooks.preserved import preserved

HOW = ["in place", "by data", "replaced", "nan"]


class Counts(nn.Module):
    """Changes its buffers in each pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.calls += 1
        elif self.how == "by data":
            self.calls.data.add_(1)
        elif self.how == "replaced":
            self.calls = self.calls + 1
        else:
            self.calls[0] = torch.nan
        return x + self.calls + torch.rand(2)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_the_random_state_come_back(how: str, fails: bool) -> None:
    model = Counts(how)
    buffer, state = model.calls, torch.get_rng_state()
    try:
        with preserved(model):
            model(torch.ones(2))
            assert bool((model.calls != 0).any())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert model.calls is buffer
    assert torch.equal(model.calls, torch.zeros(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("inference", [False, True])
def test_buffers_made_in_inference_mode(inference: bool) -> None:
    with torch.inference_mode():
        model = Counts("in place")
    with torch.inference_mode(inference), preserved(model), torch.inference_mode():
        model(torch.ones(2))
    assert torch.equal(model.calls, torch.zeros(2))


def test_scripted_modules() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1  # type: ignore[operator]
            return x + self.calls

    model: Any = torch.jit.script(Plain())
    with preserved(model):
        model(torch.ones(2))
        assert torch.equal(model.calls, torch.ones(2))
    assert torch.equal(model.calls, torch.zeros(2))


def test_a_cache_that_the_model_replaced_stays() -> None:
    """Its length is also in an attribute of the model's, which would no longer fit."""
    model = Counts("in place")
    with preserved(model):
        model.cache = torch.ones(5)
    assert torch.equal(model.cache, torch.ones(5))


def test_buffers_of_another_shape() -> None:
    model = Counts("in place")
    with preserved(model):
        model.calls.data = torch.ones(5)
    assert torch.equal(model.calls, torch.zeros(2))
