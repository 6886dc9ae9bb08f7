"""Mix: exact bits at 0 and 1, and the formula's gradients everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskhooks.masks.mix import mix
from tests.conftest import bits, same_bits

ODD = torch.tensor([-0.0, 0.0, math.nan, math.inf, -math.inf, 1e-45, -1.5, 3e38])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_open_gives_the_values_bits_and_closed_the_baselines(dtype: torch.dtype) -> None:
    """Every pair of -0.0, NaN, infinities, a subnormal and others; NaN keeps its payload."""
    value = ODD.to(dtype)[:, None].expand(8, 8)
    baseline = ODD.to(dtype)[None].expand(8, 8)
    assert same_bits(mix(value, torch.ones(8, 8), baseline), value)
    assert same_bits(mix(value, torch.zeros(8, 8), baseline), baseline)
    assert mix(value, torch.ones(8, 1), baseline).dtype == dtype


def test_payload_of_nan() -> None:
    value = torch.tensor([0x7FC01234], dtype=torch.int32).view(torch.float32)
    assert bits(mix(value, torch.ones(1), torch.zeros(1))).item() == 0x7FC01234


def test_the_usual_formula_and_lerp_fail_where_mix_does_not() -> None:
    """The reason for a function of its own; should this test fail, mix could be simpler."""
    value, one = torch.tensor([-0.0]), torch.ones(1)
    nan = torch.full((1,), math.nan)
    assert not same_bits(one * value + (1 - one) * 0.0, value)
    assert (one * value + (1 - one) * nan).isnan().all()
    assert torch.lerp(nan, value, one).isnan().all()


def test_gradcheck() -> None:
    value, baseline = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sample = torch.rand(2, 1, dtype=torch.float64).clamp(0.1, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(mix, (value, sample, baseline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The gate stays float32; its gradient is summed in float32 and does not overflow in float16."""
    value = torch.full((2, 64), 300.0, dtype=dtype, requires_grad=True)
    baseline = torch.zeros(64, requires_grad=True)
    sample = torch.full((2, 1), 0.5, requires_grad=True)
    mixed = mix(value, sample, baseline)
    assert mixed.dtype == dtype
    mixed.backward(torch.full((2, 64), 300.0, dtype=dtype))
    assert sample.grad is not None
    assert baseline.grad is not None
    assert sample.grad.dtype == torch.float32
    assert baseline.grad.dtype == torch.float32
    assert sample.grad.tolist() == [[64 * 300.0 * 300.0]] * 2
    assert baseline.grad.tolist() == [2 * 300.0 * 0.5] * 64


def test_closed_is_closed() -> None:
    """The gradient to a masked value is exactly zero, whatever the value or the incoming gradient."""
    value = ODD.clone().requires_grad_()
    grad = torch.tensor([1.0, math.nan, math.inf, -0.0, 1.0, 2.0, -math.inf, 1.0])
    mix(value, torch.zeros(8), torch.zeros(8)).backward(grad)
    assert value.grad is not None
    assert same_bits(value.grad, torch.zeros(8))


def test_open_gives_the_baseline_no_gradient() -> None:
    baseline = torch.zeros(8, requires_grad=True)
    mix(ODD, torch.ones(8), baseline).backward(torch.full((8,), math.inf))
    assert baseline.grad is not None
    assert same_bits(baseline.grad, torch.zeros(8))


def test_terms_that_are_not_finite_are_dropped_from_the_gates_gradient() -> None:
    value = torch.tensor([[math.inf, math.nan, 2.0]])
    sample = torch.tensor([[1.0]], requires_grad=True)
    mix(value, sample, torch.tensor([0.0, 0.0, -1.0])).sum().backward()
    assert sample.grad is not None
    assert sample.grad.item() == 3.0


@given(st.floats(0, 1, width=32), st.floats(width=32), st.floats(width=32))
def test_between_the_ends_it_lies_between(z: float, h: float, b: float) -> None:
    mixed = mix(torch.tensor([h]), torch.tensor([z]), torch.tensor([b])).item()
    if z in (0, 1):
        assert same_bits(torch.tensor(mixed), torch.tensor(h if z else b)) or math.isnan(mixed)
    elif math.isfinite(h) and math.isfinite(b) and abs(h) < 1e38 and abs(b) < 1e38:
        slack = 1e-6 * max(abs(h), abs(b))
        assert min(h, b) - slack <= mixed <= max(h, b) + slack


def test_a_baseline_follows_the_values_dtype_and_device() -> None:
    baseline = torch.zeros(3, dtype=torch.float64)
    assert mix(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 1), baseline).dtype == torch.bfloat16
    meta = mix(torch.ones(2, 3, device="meta"), torch.zeros(2, 1, device="meta"), baseline)
    assert meta.device.type == "meta"
