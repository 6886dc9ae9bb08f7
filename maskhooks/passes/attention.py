"""Attention pass: run the model once more so that it computes its attention weights, and check what it gives."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from maskhooks.errors import ModelError
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import compared, parameters
from maskhooks.passes.clean import Clean

_TOLERANCE = 1e-3  # of outputs in full precision


def attention_weights(clean: Clean) -> list[Float[Tensor, "batch head query key"]]:
    """Return the attention weights of each layer that has some, in float32, for the batch of a clean pass.

    Raises:
        ModelError: the model has no attention weights, what it gives are none, or it predicts something else while it
            computes them.
    """
    hooked, batch = clean.hooked, clean.batch
    with torch.no_grad(), hooked.tap():
        found = hooked.task.attention(hooked.model, batch)
        if found.result is not None:
            again = hooked.distribution(found.result, batch)
            change = float(compared(clean.outputs, again, _change).max())
            if not change <= _tolerance(hooked):
                raise ModelError(
                    f"{type(hooked.model).__name__} predicts something else while it computes attention weights: a "
                    f"parameter of its outputs changes by {change:.2g} (relative to 1 + its size). So the weights are "
                    "not those behind its predictions. Load it with plain attention (attn_implementation='eager' in "
                    "transformers), or say where they are: wrap(model, attention=...)"
                )
    if not found.weights:
        raise ModelError(f"{type(hooked.model).__name__} gave attention weights of no layer. Use LeaveOneOut instead")
    return [_four_axes(hooked, number, weights) for number, weights in enumerate(found.weights)]


def _four_axes(hooked: Hooked, number: int, weights: object) -> Float[Tensor, "batch head query key"]:
    if not isinstance(weights, Tensor) or weights.dim() not in (3, 4) or not weights.is_floating_point():
        shape = f"a tensor of shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ModelError(
            f"layer {number} of {type(hooked.model).__name__} gave no attention weights but {shape}; they have the "
            "axes batch, head (which may be missing), query and key. If this model has no such weights, use "
            "LeaveOneOut, Erasure or DiffMask"
        )
    return (weights if weights.dim() == 4 else weights[:, None]).float()


def _change(original: Distribution, again: Distribution) -> Tensor:
    """The largest relative change of a parameter, for each place of the batch shape."""
    places = len(original.batch_shape)
    pairs = zip(parameters(original), parameters(again), strict=True)
    moved = [torch.where(one == other, 0, (one - other).abs() / (1 + one.abs())).float() for one, other in pairs]
    return torch.stack([one.flatten(places).amax(-1) if one.dim() > places else one for one in moved]).amax(0)


def _tolerance(hooked: Hooked) -> float:
    """The square root of the coarsest weight's precision, but at least that of full precision."""
    tensors = itertools.chain(hooked.model.parameters(), hooked.model.buffers())
    eps = [float(torch.finfo(one.dtype).eps) for one in tensors if one.is_floating_point()]
    return max([_TOLERANCE, *map(math.sqrt, eps)])
