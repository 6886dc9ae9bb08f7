"""One step of each kind of recurrent module; the input projections of all steps are computed first.

The equations are those of torch.nn.RNN, GRU and LSTM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskhooks_recurrent.weights import Weights

States = tuple[Tensor, Tensor | None]  # h, and c for an LSTM
Place = Callable[[Tensor], Tensor]
Step = Callable[[int, Tensor, Tensor | None, Place], States]
_PRECISE = (torch.float32, torch.float64)


def cell(module: nn.RNNBase, given: Tensor, own: Weights) -> Step:
    """Return a function of the step, h, c and the place that c passes; it returns the next h and c."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(given.device.type)
    if isinstance(module, nn.GRU) and plain and given.dtype == own.states.dtype in _PRECISE:
        return _quick_gru(given, own)
    parts = _products(given, own.inputs, own.input_bias)
    if isinstance(module, nn.LSTM):
        return _lstm(parts.unbind(0), own)
    if isinstance(module, nn.GRU):
        return _gru(parts, own)
    assert isinstance(module, nn.RNN)
    return _rnn(parts.unbind(0), own, torch.tanh if module.nonlinearity == "tanh" else torch.relu)


def _products(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The input projections of all steps, `token batch feature`, as one product whatever the memory layout."""
    return F.linear(given.reshape(-1, given.shape[-1]), weight, bias).view(*given.shape[:2], -1)


def _rnn(parts: Sequence[Tensor], own: Weights, function: Callable[[Tensor], Tensor]) -> Step:
    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        return function(parts[at] + F.linear(h, own.states, own.state_bias)), None

    return step


def _gru(parts: Tensor, own: Weights) -> Step:
    size = own.states.shape[1]
    gates, news = parts.split([2 * size, size], -1)
    every = list(zip(gates.unbind(0), news.unbind(0), strict=True))
    blend = _promoting if torch.is_autocast_enabled(parts.device.type) else torch.lerp

    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        of_gates, of_news = every[at]
        gate, new = F.linear(h, own.states, own.state_bias).split([2 * size, size], -1)
        reset, keep = (of_gates + gate).sigmoid().chunk(2, -1)
        fresh = torch.addcmul(of_news, reset, new).tanh()
        return blend(fresh, h, keep), None

    return step


def _quick_gru(given: Tensor, own: Weights) -> Step:
    """`_gru` without gradients: in place, with tanh(x) = 2 s(2x) - 1, because sigmoids are several times as fast.

    The weights absorb the inner factor 2, which is exact. One `addmm` adds a step's product to the other terms.
    """
    size, one = own.states.shape[1], own.states.new_ones(())
    scale = own.states.new_ones(3 * size, 1)
    scale[2 * size :] = 2
    weight, less = (own.states * scale).t(), -one
    bias, last = own.input_bias, 0 * one
    if bias is not None and own.state_bias is not None:
        bias = torch.cat([(bias + own.state_bias)[: 2 * size], bias[2 * size :]])
        last = 2 * own.state_bias[2 * size :]
    parts = _products(given, own.inputs, bias)
    news = (2 * parts[..., 2 * size :]).unbind(0)
    parts[..., 2 * size :] = last
    terms = parts.unbind(0)
    rows = -1
    room: tuple[Tensor, ...] = ()

    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        nonlocal rows, room
        if h.shape[0] != rows:
            rows, room = h.shape[0], _room(h, size)
        products, gates, reset, keep, new, fresh = room
        torch.addmm(terms[at], h, weight, out=products)
        gates.sigmoid_()
        torch.addcmul(news[at], reset, new, out=fresh).sigmoid_()
        return torch.lerp(torch.add(less, fresh, alpha=2, out=fresh), h, keep), None

    return step


def _room(h: Tensor, size: int) -> tuple[Tensor, ...]:
    """Buffers of a step: the products, their views gates, reset, keep and new state, and the fresh state."""
    products = h.new_empty(len(h), 3 * size)
    gates, new = products[:, : 2 * size], products[:, 2 * size :]
    return products, gates, gates[:, :size], gates[:, size:], new, h.new_empty(len(h), size)


def _promoting(fresh: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    """lerp for autocast, where the products have lower precision than the state."""
    return fresh + keep * (h - fresh)


def _lstm(parts: Sequence[Tensor], own: Weights) -> Step:
    def step(at: int, h: Tensor, c: Tensor | None, place: Place) -> States:
        assert c is not None
        let_in, keep, fresh, let_out = (parts[at] + F.linear(h, own.states, own.state_bias)).chunk(4, -1)
        c = place(torch.addcmul(keep.sigmoid() * c, let_in.sigmoid(), fresh.tanh()))
        h = let_out.sigmoid() * c.tanh()
        return (h if own.projection is None else F.linear(h, own.projection)), c

    return step
