"""The forward that replaces a recurrent module's own while it is tapped."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from maskhooks.hooks.replay import ForwardPatch
from maskhooks.sites.modules import places
from maskhooks_recurrent.cells import cell
from maskhooks_recurrent.layout import Layout, State
from maskhooks_recurrent.weights import Weights, suffixes, weights


class Tapped(ForwardPatch):
    """Runs step by step, with the module's weights, while a state is tapped; otherwise the module's own forward."""

    module: nn.RNNBase

    def __call__(self, input: Tensor | PackedSequence, hx: State | None = None) -> Any:
        stands = places(self.module)
        stepped = any(_tapped(place) for name, place in stands.items() if name != "inputs")
        fits = isinstance(input, PackedSequence) or input.dim() in (
            2,
            3,
        )  # otherwise the fused call raises its own error
        if fits and (stepped or _tapped(stands["inputs"])):
            layout, values = Layout.of(self.module, input)
            if _tapped(stands["inputs"]):
                values = stands["inputs"](values.transpose(0, 1)).transpose(0, 1)
            if stepped:
                return _steps(self.module, layout, values, hx)
            input = layout.back(values)
        return self._fused(input, hx)

    def _fused(self, given: Tensor | PackedSequence, hx: State | None) -> Any:
        """The module's own forward; in training mode without dropout where cuDNN has no gradients in eval mode."""
        device = given.data.device if isinstance(given, PackedSequence) else given.device
        if device.type != "cuda" or not torch.is_grad_enabled():
            return self.__wrapped__(given, hx)
        own = self.module.training, self.module.dropout
        self.module.training, self.module.dropout = True, 0.0
        try:
            return self.__wrapped__(given, hx)
        finally:
            self.module.training, self.module.dropout = own


def _same(state: Tensor) -> Tensor:
    return state


def _tapped(place: nn.Module) -> bool:
    return bool(place._forward_hooks or place._forward_pre_hooks)


def _steps(module: nn.RNNBase, layout: Layout, values: Tensor, hx: State | None) -> tuple[Any, State]:
    """Run all layers and directions in turn; dropout is off, because a tapped model is in eval mode."""
    first = initial(module, layout, values, hx)
    lower = _lowered(module, values.device.type)
    values, first = (values, first) if lower is None else (values.to(lower), tuple(part.to(lower) for part in first))
    own = weights(module)
    width = 2 if module.bidirectional else 1
    last: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        sides = []
        for suffix in suffixes(module)[layer * width : (layer + 1) * width]:
            begin = tuple(states[len(last)] for states in first)
            outputs, end = _sequence(module, suffix, own[suffix], values, begin, layout.valid)
            sides.append(outputs)
            last.append(end)
        values = torch.cat(sides, -1) if width == 2 else sides[0]
    ends = tuple(layout.last(torch.stack(states)) for states in zip(*last, strict=True))
    return layout.back(values), (ends[0], ends[1]) if isinstance(module, nn.LSTM) else ends[0]


def _lowered(module: nn.RNNBase, device: str) -> torch.dtype | None:
    """The dtype to which autocast casts all inputs of the fused call; None if it casts only those of products."""
    whole = device != "cpu" or isinstance(module, nn.LSTM)
    return torch.get_autocast_dtype(device) if whole and torch.is_autocast_enabled(device) else None


def _sequence(
    module: nn.RNNBase, suffix: str, own: Weights, values: Tensor, begin: tuple[Tensor, ...], valid: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer in one direction; return its outputs, `token batch hidden`, and its last states."""
    stands, steps = places(module), len(values)
    h_place, c_place = stands[f"h_{suffix}"], stands.get(f"c_{suffix}")
    step = cell(module, values, own)
    h, c = begin[0], begin[1] if len(begin) > 1 else None
    outputs: list[Tensor] = [h] * steps
    h_tapped, c_tapped = _tapped(h_place), c_place is not None and _tapped(c_place)
    for at in reversed(range(steps)) if suffix.endswith("_reverse") else range(steps):
        place = functools.partial(c_place, step=at, steps=steps) if c_place is not None and c_tapped else _same
        new, cell_state = step(at, h, c, place)
        new = h_place(new, at, steps) if h_tapped else new
        if valid is not None:  # at padding a sequence keeps its state
            new = torch.where(valid[at], new, h)
            cell_state = None if cell_state is None or c is None else torch.where(valid[at], cell_state, c)
        outputs[at] = h = new
        c = cell_state
    return torch.stack(outputs), (h,) if c is None else (h, c)


def initial(module: nn.RNNBase, layout: Layout, values: Tensor, hx: State | None) -> tuple[Tensor, ...]:
    """The initial states, `layer batch hidden`; raises what the fused call raises."""
    count, size = values.shape[1], module.proj_size or module.hidden_size
    sizes = [size, module.hidden_size] if isinstance(module, nn.LSTM) else [size]
    layers = len(suffixes(module))
    if hx is None:
        found = tuple(values.new_zeros(layers, count, size) for size in sizes)
    else:
        found = tuple(layout.first(states) for states in hx) if isinstance(hx, tuple) else (layout.first(hx),)
    layout.checked(module, values, found if isinstance(module, nn.LSTM) else found[0])
    return found
