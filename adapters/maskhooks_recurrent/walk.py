"""Steps of a recurrent module from many states at once, with two inputs each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskhooks.hooks.recurrence import Walk
from maskhooks_recurrent.cells import cell
from maskhooks_recurrent.weights import suffixes, weights


class Layers(Walk):
    """Any number of layers in one direction; a state is the h of each layer, then, for an LSTM, the c of each."""

    def __init__(self, module: nn.RNNBase, kept: Tensor, closed: Tensor, first: tuple[Tensor, ...]) -> None:
        self.module = module
        self.length = len(kept)
        self.first = torch.cat([state for states in first for state in states], -1)
        self._own = [weights(module)[suffix] for suffix in suffixes(module)]
        self._sizes = [part.shape[-1] for states in first for part in states]
        self._cells = [cell(module, given[:, None], self._own[0]) for given in (kept, closed)]

    def parts(self, states: Tensor) -> tuple[Tensor, ...]:
        """The states as the module returns them, each `layer row hidden`."""
        split = states.split(self._sizes, -1)
        layers = self.module.num_layers
        return tuple(torch.stack(split[begin : begin + layers]) for begin in range(0, len(split), layers))

    def step(self, at: int, states: Tensor, closed: Tensor | None, kept: Tensor | None) -> None:
        before = [part.contiguous() for part in states.split(self._sizes, -1)]
        for begin, out in zip(self._cells, (kept, closed), strict=True):
            if out is not None:
                self._layers(begin, at, before, out)

    def _layers(self, begin: object, at: int, before: list[Tensor], out: Tensor) -> None:
        layers = self.module.num_layers
        after: list[Tensor | None] = [None] * len(before)
        given = begin
        for layer, own in enumerate(self._own):
            step = given if layer == 0 else cell(self.module, after[layer - 1][None], own)  # type: ignore[index]
            c = before[layers + layer] if len(before) > layers else None
            h, c = step(at if layer == 0 else 0, before[layer], c, lambda state: state)  # type: ignore[operator]
            after[layer] = h
            if c is not None:
                after[layers + layer] = c
        torch.cat([part for part in after if part is not None], -1, out=out)


class GRULayer(Walk):
    """One layer of a GRU.

    Both successors of a state share its product with the weights. Sigmoids are several times as fast as tanh, so a
    state is stored as g = (h + 1) / 2: with tanh(x) = 2 s(2x) - 1, the new one is g' = (1 - z) s(2x) + z g. The weights
    absorb the change of scale.
    """

    def __init__(self, module: nn.GRU, kept: Tensor, closed: Tensor, first: Tensor) -> None:
        (own,) = weights(module).values()
        size = module.hidden_size
        scale = torch.ones(3 * size, 1, dtype=first.dtype, device=first.device)
        scale[2 * size :] = 2  # inside the sigmoid that replaces tanh
        bias = torch.zeros_like(own.states[:, 0]) if own.state_bias is None else own.state_bias
        self._weight = (2 * scale * own.states).t().contiguous()
        self._bias = scale[:, 0] * (bias - own.states.sum(1))
        inputs = (F.linear(given, own.inputs, own.input_bias) * scale[:, 0] for given in (kept, closed))
        self._inputs = [(part[:, : 2 * size].contiguous(), part[:, 2 * size :].contiguous()) for part in inputs]
        self._size = size
        self._room: tuple[Tensor, ...] = ()
        self.first = (first[0] + 1) / 2
        self.length = len(kept)

    def parts(self, states: Tensor) -> tuple[Tensor, ...]:
        """The states as the module returns them, from those that are kept between 0 and 1."""
        return ((2 * states - 1)[None],)

    def step(self, at: int, states: Tensor, closed: Tensor | None, kept: Tensor | None) -> None:
        size = self._size
        products, gates, fresh = self._work(states)
        torch.addmm(self._bias, states, self._weight, out=products)
        for (of_gates, of_fresh), out in zip(self._inputs, (kept, closed), strict=True):
            if out is not None:
                torch.add(products[:, : 2 * size], of_gates[at], out=gates).sigmoid_()
                torch.addcmul(of_fresh[at], gates[:, :size], products[:, 2 * size :], out=fresh).sigmoid_()
                torch.lerp(fresh, states, gates[:, size:], out=out)

    def _work(self, states: Tensor) -> list[Tensor]:
        """Buffers for intermediate results, reused at every step."""
        count, size = states.shape
        if not self._room or len(self._room[0]) < count:
            self._room = tuple(states.new_empty(count, parts * size) for parts in (3, 2, 1))
        return [part[:count] for part in self._room]


def walk(module: nn.RNNBase, kept: Tensor, closed: Tensor, first: tuple[Tensor, ...]) -> Layers | GRULayer:
    """Return the steps of a unidirectional module.

    Args:
        kept, closed: inputs of kept and of masked positions, `step feature`.
        first: initial states, each `layer 1 hidden`.
    """
    if isinstance(module, nn.GRU) and module.num_layers == 1:
        return GRULayer(module, kept, closed, first[0])
    return Layers(module, kept, closed, first)
