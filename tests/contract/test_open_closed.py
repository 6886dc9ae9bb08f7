"""Invariants 2, 3 and 7: an open gate changes no bit, a closed one lets nothing through, dtypes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.hooks.tap import Tap
from maskhooks.masks.mix import mix
from maskhooks.sites.site import Site
from tests.conftest import same_bits
from tests.models import MLP, Cell, KeywordOnly, Nested, Noisy, Stack, Tiny

# Sites through which all information goes, and one more for each model that has a way around it.
TIGHT = {
    MLP: ["first:output", "act:input", "last:input", "last:output", ":input"],
    Stack: ["embed:output", "layers.1:output", "act@0:output", "head:input"],
    Nested: ["parts:input", "head:input", ":output.logits"],
    Cell: ["cell@2:output", "head:input", ":input"],
    KeywordOnly: ["block:input.states", "block:output", ":input.states"],
    Noisy: ["first:output", "drop:output", "last:output"],
}
OPEN_SITES = [(make, address) for make, addresses in TIGHT.items() for address in addresses]
AROUND = [(Nested, "parts:output[0]"), (Cell, "cell@1:output")]


def gated(z: float, baseline: float = 0.5) -> Callable[[Tensor], Tensor]:
    def replace(value: Tensor) -> Tensor:
        shape = (*value.shape[:-1], 1)
        return mix(value, torch.full(shape, z), torch.full(value.shape[-1:], baseline))

    return replace


def logits(model: Tiny, batch: Any) -> Tensor:
    outputs = model(**batch) if isinstance(batch, dict) else model(*batch)
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return found


@pytest.mark.parametrize(("make", "address"), OPEN_SITES + AROUND)
def test_open_gates_leave_every_bit(make: type[Tiny], address: str) -> None:
    """Also with a baseline of NaN, which an open gate must not let in."""
    model = make().eval()
    batch = model.example()
    usual = logits(model, batch)
    with Tap(model, replace={Site.parse(address): gated(1.0, float("nan"))}):
        assert same_bits(logits(model, batch), usual)


@pytest.mark.parametrize(("make", "address"), OPEN_SITES)
def test_closed_gates_let_no_other_input_through(make: type[Tiny], address: str) -> None:
    model = make().eval()
    batch, other = model.example(), model.example()
    assert not same_bits(logits(model, batch), logits(model, other))
    with Tap(model, replace={Site.parse(address): gated(0.0)}):
        assert same_bits(logits(model, batch), logits(model, other))


@pytest.mark.parametrize(("make", "address"), AROUND)
def test_a_way_around_shows(make: type[Tiny], address: str) -> None:
    """The same test says so where information goes another way; gradients at the site could not."""
    model = make().eval()
    batch, other = model.example(), model.example()
    with Tap(model, replace={Site.parse(address): gated(0.0)}):
        assert not same_bits(logits(model, batch), logits(model, other))


@pytest.mark.parametrize(("make", "address"), OPEN_SITES + AROUND)
def test_the_gradient_to_a_closed_value_is_exactly_zero(make: type[Tiny], address: str) -> None:
    model = make().eval()
    seen: list[Tensor] = []

    def close(value: Tensor) -> Tensor:
        seen.append(value.detach().requires_grad_())
        return gated(0.0)(seen[-1])

    with Tap(model, replace={Site.parse(address): close}):
        logits(model, model.example()).sum().backward()
    assert seen[0].grad is not None
    assert same_bits(seen[0].grad, torch.zeros_like(seen[0]))


@pytest.mark.parametrize(("make", "address"), [pair for pair in OPEN_SITES if pair[0] is not Stack])
def test_gates_at_either_end_still_learn(make: type[Tiny], address: str) -> None:
    """A ReLU in place may kill the stack's gradient for good reasons, hence without it."""
    for z in (0.0, 1.0):
        model = make().eval()
        samples: list[Tensor] = []

        def replace(value: Tensor, z: float = z, samples: list[Tensor] = samples) -> Tensor:
            samples.append(torch.full((*value.shape[:-1], 1), z, requires_grad=True))
            return mix(value, samples[-1], torch.full(value.shape[-1:], 0.5))

        with Tap(model, replace={Site.parse(address): replace}):
            (logits(model, model.example()) - 1).square().sum().backward()
        assert samples[0].grad is not None
        assert samples[0].grad.abs().sum() > 0


@pytest.mark.parametrize(("make", "address"), OPEN_SITES + AROUND)
def test_a_replayed_mask_is_the_full_passes(make: type[Tiny], address: str) -> None:
    model, site = make().eval(), Site.parse(address)
    batch, replay = model.example(), Replay(model)
    replay.trace(lambda: logits(model, batch))
    with frozen(model), torch.no_grad():
        with replay.record([site]) as recording:
            logits(model, batch)
        with Tap(model, replace={site: gated(0.3)}):
            full = logits(model, batch)
            with recording.play(site):
                assert same_bits(logits(model, batch), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_float32_baseline_does_not_promote_the_model(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    baseline = torch.zeros(4, requires_grad=True)
    sample = torch.full((3, 1), 0.5, requires_grad=True)
    with Tap(model, replace={Site.parse("0:output"): lambda value: mix(value, sample, baseline)}):
        outputs = model(torch.randn(3, 4, dtype=dtype))
    assert outputs.dtype == dtype
    outputs.sum().backward()
    assert baseline.grad is not None
    assert sample.grad is not None
    assert baseline.grad.dtype == sample.grad.dtype == torch.float32
