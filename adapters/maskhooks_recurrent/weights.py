"""Weights: those of one layer and direction, as the fused call takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Weights(NamedTuple):
    """Of one layer and direction; `projection` is an LSTM's with `proj_size`."""

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    projection: Tensor | None


def suffixes(module: nn.RNNBase) -> list[str]:
    """How torch calls layers and directions, in the order of computation: `l0`, `l0_reverse`, `l1`, ..."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def weights(module: nn.RNNBase) -> dict[str, Weights]:
    """By suffix, the very tensors that the fused call takes."""
    found = {}
    flat = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
    for suffix in suffixes(module):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        w_ih, w_hh, b_ih, b_hh, w_hr = (flat.get(f"{name}_{suffix}") for name in names)
        assert w_ih is not None
        assert w_hh is not None
        found[suffix] = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    return found
