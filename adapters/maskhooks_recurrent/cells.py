"""Cells: one step of each kind of recurrent module, with what it takes from the input computed before for all steps.

The equations are those of torch.nn.RNN, GRU and LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskhooks_recurrent.weights import Weights

States = tuple[Tensor, Tensor | None]  # h, and of an LSTM c
Place = Callable[[Tensor], Tensor]
Step = Callable[[int, Tensor, Tensor | None, Place], States]


def cell(module: nn.RNNBase, given: Tensor, own: Weights) -> Step:
    """A function of step, h, c and the place that c passes; it gives the next h and c."""
    parts = F.linear(given, own.inputs, own.input_bias)
    if isinstance(module, nn.LSTM):
        return _lstm(parts.unbind(0), own)
    if isinstance(module, nn.GRU):
        return _gru(parts, own)
    assert isinstance(module, nn.RNN)
    return _rnn(parts.unbind(0), own, torch.tanh if module.nonlinearity == "tanh" else torch.relu)


def _rnn(parts: Sequence[Tensor], own: Weights, function: Callable[[Tensor], Tensor]) -> Step:
    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        return function(parts[at] + F.linear(h, own.states, own.state_bias)), None

    return step


def _gru(parts: Tensor, own: Weights) -> Step:
    size = own.states.shape[1]
    gates, news = (part.unbind(0) for part in parts.split([2 * size, size], -1))
    blend = _promoting if torch.is_autocast_enabled(parts.device.type) else torch.lerp

    def quick(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        """The same in place, where no gradient is wanted."""
        parts = F.linear(h, own.states, own.state_bias)
        reset, keep = parts.narrow(-1, 0, 2 * size).add_(gates[at]).sigmoid_().chunk(2, -1)
        fresh = torch.addcmul(news[at], reset, parts.narrow(-1, 2 * size, size)).tanh_()
        return blend(fresh, h, keep), None

    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        gate, new = F.linear(h, own.states, own.state_bias).split([2 * size, size], -1)
        reset, keep = (gates[at] + gate).sigmoid().chunk(2, -1)
        fresh = torch.addcmul(news[at], reset, new).tanh()
        return blend(fresh, h, keep), None

    return step if torch.is_grad_enabled() else quick


def _promoting(fresh: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    """lerp where autocast has made products of lower precision than the state."""
    return fresh + keep * (h - fresh)


def _lstm(parts: Sequence[Tensor], own: Weights) -> Step:
    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        assert c is not None
        let_in, keep, fresh, let_out = (parts[at] + F.linear(h, own.states, own.state_bias)).chunk(4, -1)
        c = place(torch.addcmul(keep.sigmoid() * c, let_in.sigmoid(), fresh.tanh()))
        h = let_out.sigmoid() * c.tanh()
        return (h if own.projection is None else F.linear(h, own.projection)), c

    return step
