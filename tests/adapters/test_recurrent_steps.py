"""Recurrent modules step by step: open gates are the fused call, gated states go on, closed ones give no gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from maskhooks_recurrent.adapter import RecurrentAdapter
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import maskhooks
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.time_steps import Stepwise
from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.masks.mix import mix
from maskhooks.sites.places import Places
from tests.adapters.recurrent_models import INPUTS, KINDS, LENGTHS, arguments, assert_near, flat, network, open_gates
from tests.conftest import fingerprint, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_are_the_fused_call(kind: str, given: str, dtype: torch.dtype) -> None:
    for number, (layers, both, bias) in enumerate(itertools.product((1, 2), (False, True), (False, True))):
        first, initial = number % 2 == 0, number % 3 == 0
        module = network(kind, layers, both, first, bias=bias).to(dtype)
        leaf, x, states = arguments(module, given, initial, dtype)
        call = (x,) if states is None else (x, states)
        hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
        with frozen(module):
            usual = module(*call)
        weights = [torch.randn_like(part) for part in flat(usual)]
        slope = torch.autograd.grad(flat(usual), leaf, weights, retain_graph=True)
        before = fingerprint(module)
        with hooked.tap(replace=dict.fromkeys(map(str, hooked.sites), open_gates)):
            gated = module(*call)
        assert fingerprint(module) == before
        assert_near(flat(gated), flat(usual), dtype)
        assert_near(list(torch.autograd.grad(flat(gated), leaf, weights)), list(slope), dtype)
        if isinstance(x, PackedSequence):
            assert same_bits(gated[0].batch_sizes, x.batch_sizes)
            assert (gated[0].sorted_indices is None) == (x.sorted_indices is None)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_state_goes_on_and_the_rest_agrees_with_it(kind: str, given: str) -> None:
    """The recurrence as written down: each state is made from the gated one before it."""
    module = network(kind, both=True).double()
    leaf, x, states = arguments(module, given, True, torch.float64)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    gates = torch.rand(4, 5, 1, dtype=torch.float64)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def gate(name: str) -> Any:
        def replace(value: Tensor) -> Tensor:
            calls = seen.setdefault(name, [])
            at = len(calls) if "reverse" not in name else 4 - len(calls)
            calls.append((value[:, 0], value[:, 0] * gates[: len(value), at]))
            return calls[-1][1][:, None]

        return replace

    with hooked.tap(replace={str(site): gate(site.module) for site in hooked.sites if site.module[0] == "h"}):
        output, last = module(x, states)
    h_n = last[0] if isinstance(last, tuple) else last
    if given == "alone":
        output, h_n = output[None], h_n[:, None]
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, batch_first=True)
    size = h_n.shape[-1]
    lengths = LENGTHS.get(given, [5] * len(output))
    for row, length in enumerate(lengths):
        forward = [new[row] for _, new in seen["h_l0"]][:length]
        backward = [new[row] for _, new in reversed(seen["h_l0_reverse"])][:length]
        assert torch.equal(output[row, :length, :size], torch.stack(forward))
        assert torch.equal(output[row, :length, size:], torch.stack(backward))
        assert torch.equal(h_n[0, row], forward[-1])
        assert torch.equal(h_n[1, row], backward[0])
    if kind in ("tanh", "relu", "gru") and given == "batch":
        cell = {"gru": nn.GRUCell(4, 6), "tanh": nn.RNNCell(4, 6), "relu": nn.RNNCell(4, 6, nonlinearity="relu")}[kind]
        cell.double().load_state_dict({name: getattr(module, f"{name}_l0") for name in cell.state_dict()})
        h = states[0]
        for at in range(5):
            made, h = cell(leaf[:, at], h), seen["h_l0"][at][1]
            before = states[0] if at == 0 else seen["h_l0"][at - 1][1]
            torch.testing.assert_close(cell(leaf[:, at], before), seen["h_l0"][at][0])
            assert made.shape == h.shape


@pytest.mark.parametrize("kind", ["lstm", "lstm-proj"])
def test_a_gated_cell_state_goes_on(kind: str) -> None:
    module = network(kind)
    _, x, _ = arguments(module, "batch", False, torch.float32)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    with hooked.tap(read="h_l0:output", replace={"c_l0:output": torch.zeros_like}) as tap:
        output, (h, c) = module(x)
    assert not c.any()
    assert not h.any()  # o * tanh(0)
    assert torch.equal(tap.values["h_l0:output"], output)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_give_exactly_no_gradient(kind: str, given: str) -> None:
    module = network(kind, layers=2)
    _, x, states = arguments(module, given, True, torch.float32)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    for address in ("inputs:output", "h_l0:output", "h_l1:output"):
        values: list[Tensor] = []

        def close(value: Tensor, values: list[Tensor] = values) -> Tensor:
            values.append(value.detach().requires_grad_())
            return mix(values[-1], torch.zeros(*value.shape[:2], 1), torch.randn(value.shape[-1]).requires_grad_())

        with hooked.tap(replace={address: close}):
            sum(part.sum() for part in flat(module(x, states))).backward(retain_graph=True)
        assert values
        assert all(value.grad is not None and not value.grad.any() for value in values)


def test_single_steps_are_calls_in_the_order_of_computation() -> None:
    module = nn.GRU(4, 6, batch_first=True, bidirectional=True)
    hooked, x = maskhooks.wrap(module, adapter=RecurrentAdapter), torch.randn(3, 5, 4)
    with hooked.tap(read=["h_l0:output", "h_l0@1:output", "h_l0_reverse@*:output"]) as tap:
        output, _ = module(x)
    assert torch.equal(tap.values["h_l0@1:output"], output[:, 1, :6])
    assert torch.equal(tap.values["h_l0:output"], output[..., :6])
    assert torch.equal(tap.values["h_l0_reverse@0:output"], output[:, 4, 6:])
    with hooked.tap(replace={"h_l0@2:output": torch.zeros_like}):
        output, _ = module(x)
    assert [bool(output[:, at, :6].any()) for at in range(5)] == [True, True, False, True, True]
    wanted = torch.randn(3, 5, 6)
    with hooked.tap(replace={"h_l0:output": lambda value: wanted}):  # all steps at once
        assert torch.equal(module(x)[0][..., :6], wanted)


@pytest.mark.parametrize("cell", [nn.RNNCell(4, 6), nn.GRUCell(4, 6)], ids=["rnn", "gru"])
def test_cells_in_a_loop_of_the_users_are_reached_by_calls(cell: nn.Module) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 6)
            for at in range(x.shape[1]):
                h = self.cell(x[:, at], h)
            return h

    model = Loop()
    hooked, x = maskhooks.wrap(model), torch.randn(3, 5, 4)
    other = torch.cat([torch.randn(3, 3, 4), x[:, 3:]], 1)
    with hooked.tap(read="cell@*:output", replace={"cell@2:output": torch.zeros_like}) as tap:
        closed = model(x)
        assert torch.equal(closed, model(other))
    assert list(tap.values) == [f"cell@{at}:output" for at in range(5)]
    assert not torch.equal(model(x), model(other))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_autocast_decides_as_in_the_fused_call(kind: str, given: torch.dtype) -> None:
    module = network(kind, both=True)
    x = torch.randn(3, 5, 4).to(given)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    for grad in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            try:
                usual = module(x)
            except RuntimeError as error:  # without a tap either
                pytest.skip(f"this processor has no such kernel: {error}")
            with hooked.tap(replace=dict.fromkeys(map(str, hooked.sites), open_gates)):
                gated = module(x)
        for one, other in zip(flat(gated), flat(usual), strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_eval_mode_on_a_gpu(kind: str, unchanged: Any) -> None:
    model = unchanged(nn.Sequential(nn.Linear(4, 4), network(kind, layers=2)).cuda().eval())
    hooked, x = maskhooks.wrap(model, adapter=RecurrentAdapter), torch.randn(3, 5, 4, device="cuda")
    usual = model(x)
    leaf = torch.randn(3, 5, 4, device="cuda", requires_grad=True)
    for address in ("0:output", "1.inputs:output"):
        with hooked.tap(replace={address: lambda value: leaf}):
            (slope,) = torch.autograd.grad(model(x)[0].sum(), leaf)
        assert slope.any()
    with hooked.tap(replace={"1.h_l0:output": torch.clone}):
        torch.testing.assert_close(flat(model(x)), flat(usual), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_gates_without_gradients_are_those_with_them(kind: str) -> None:
    module = network(kind, both=True)
    _, x, _ = arguments(module, "batch", False, torch.float32)
    hooked = maskhooks.wrap(module, adapter=RecurrentAdapter)
    baseline = Learned(torch.tensor([-0.0, 1.0, float("inf"), 0.5, -1.0, 2.0]))
    baseline.start((6,))
    masking = Masking(hooked.sites["h_l0:output"], 0, [], HardConcrete(), baseline)
    value, there = torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.bool)
    value[0, :, 0] = -0.0
    sample = torch.tensor([0.0, 1.0, 0.3, 0.7, 1.0]).expand(4, 5).contiguous()
    onto = masking.replacement(masking.mask(value, Places(there), sample))
    assert isinstance(onto, Stepwise)
    for step in range(5):
        with torch.no_grad():
            quick = onto.on(step, value[:, step])
        usual = onto.at(step)(value[:, step : step + 1])[:, 0]
        if sample[0, step] in (0, 1):
            assert same_bits(quick, usual)
        else:  # but for the infinite one
            torch.testing.assert_close(quick[:, [0, 1, 3, 4, 5]], usual[:, [0, 1, 3, 4, 5]])
    sample = sample.flip(0)
    sample[:, 0] = 1.0
    baseline = Learned(torch.randn(6))
    baseline.start((6,))
    masking = Masking(hooked.sites["h_l0:output"], 0, [], HardConcrete(), baseline)
    onto = masking.replacement(masking.mask(value, Places(there), sample))
    with hooked.tap(replace={"h_l0:output": onto}):
        usual = flat(module(x))
        with torch.no_grad():
            assert_near(flat(module(x)), usual, torch.float32)
            with hooked.tap(read="h_l0:output") as inner:
                module(x)
    assert_near([inner.values["h_l0:output"]], [usual[0][..., :6]], torch.float32)
