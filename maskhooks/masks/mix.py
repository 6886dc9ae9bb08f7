"""Mix: combine value, gate sample and baseline, exactly at 0 and 1, where gates still learn."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def mix(
    value: Shaped[Tensor, "*value"], sample: Float[Tensor, "..."], baseline: Shaped[Tensor, "..."]
) -> Shaped[Tensor, "*value"]:
    """Return `z h + (1 - z) b` (De Cao et al. 2020, eq. 2), bit for bit the value at z = 1 and the baseline at 0.

    The usual formula turns -0.0 into 0.0, and gives NaN for a NaN baseline under an open gate or an infinite
    value under a closed one. The gradients are the formula's, also at 0 and 1, so gates at either end still
    learn: dh = g z, db = g (1 - z), dz = sum of g (h - b) without non-finite terms. dh is exactly zero under a
    closed gate, db under an open one.

    Args:
        value: h, any shape.
        sample: z in [0, 1], broadcastable to the value's shape; any float dtype.
        baseline: b, broadcastable to the value's shape.

    Returns:
        A tensor of the value's shape, dtype and device.
    """
    mixed: Tensor = _Mix.apply(value, sample, baseline.to(value))  # type: ignore[no-untyped-call] # torch's own
    return mixed


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, sample: Tensor, baseline: Tensor) -> Tensor:
        ctx.save_for_backward(value, sample, baseline)
        weight = sample.to(value.dtype)
        between = torch.lerp(baseline.expand_as(value), value, weight.expand_as(value))
        return torch.where(weight == 1, value, torch.where(weight == 0, baseline, between))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, sample, baseline = ctx.saved_tensors
        weight = sample.to(grad.dtype)
        of_value = of_sample = of_baseline = None
        if ctx.needs_input_grad[0]:
            of_value = torch.where(weight == 0, 0, grad * weight)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grad.dtype, sample.dtype)  # half precision may overflow or lose all digits
            terms = grad.to(wide) * (value.to(wide) - baseline.to(wide))
            terms = torch.nan_to_num(terms, nan=0.0, posinf=0.0, neginf=0.0)
            of_sample = terms.sum_to_size(sample.shape).to(sample.dtype)
        if ctx.needs_input_grad[2]:
            of_baseline = torch.where(weight == 1, 0, grad * (1 - weight)).sum_to_size(baseline.shape)
        return of_value, of_sample, of_baseline
