"""Mix against `z h + (1 - z) b` and its autograd, in float64 (De Cao et al. 2020, eq. 2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskhooks.masks.mix import mix


def reference(value: Tensor, sample: Tensor, baseline: Tensor) -> Tensor:
    return sample * value + (1 - sample) * baseline


@pytest.mark.parametrize("ends", [False, True])
def test_value_and_gradients_are_the_formulas_in_float64(ends: bool) -> None:
    """Also at exactly 0 and 1, where autograd through `where` would give the gate no gradient."""
    torch.manual_seed(1)
    shapes = (4, 6, 5), (4, 6, 1), (5,)
    value, sample, baseline = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    sample = (sample > 0).double() if ends else sample.sigmoid()
    ours = [part.clone().requires_grad_() for part in (value, sample, baseline)]
    theirs = [part.clone().requires_grad_() for part in (value, sample, baseline)]
    grad = torch.randn(4, 6, 5, dtype=torch.float64)
    one, other = mix(*ours), reference(*theirs)
    torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    one.backward(grad)
    other.backward(grad)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        assert mine.grad.shape == mine.shape
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-12, atol=1e-12)
    if ends:
        assert sample.eq(0).any()
        assert sample.eq(1).any()
