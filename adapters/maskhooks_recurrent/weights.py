"""The weights of each layer and direction, as the fused call takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Weights(NamedTuple):
    """The weights of one layer and direction; only an LSTM with `proj_size` has a `projection`."""

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    projection: Tensor | None


def suffixes(module: nn.RNNBase) -> list[str]:
    """Torch's names of layers and directions, in order of computation: `l0`, `l0_reverse`, `l1`, ..."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def weights(module: nn.RNNBase) -> dict[str, Weights]:
    """The tensors that the fused call takes, by suffix."""
    found = {}
    flat = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    for suffix in suffixes(module):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        w_ih, w_hh, b_ih, b_hh, w_hr = (flat.get(f"{name}_{suffix}") for name in names)
        assert w_ih is not None
        assert w_hh is not None
        found[suffix] = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    return found
