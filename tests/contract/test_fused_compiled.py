"""Fused and compiled paths work or are refused with a way out; docs/explanation/what-works.md says which."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import maskhooks
from maskhooks.errors import CompiledModelError, NotATensorError, SiteNeverFiredError, TappedModelError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.tap import Tap
from maskhooks.masks.mix import mix
from maskhooks.sites.site import Site
from tests.conftest import fingerprint, same_bits
from tests.models import MLP

PAD = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()


class Encoder(nn.Module):
    """torch's own encoder, which computes in fused kernels, and with nested tensors where a mask is given."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.encoder(x, src_key_padding_mask=mask)
        if mask is not None:
            hidden = hidden.masked_fill(mask[..., None], 0)
        result: Tensor = self.head(hidden.sum(1))
        return result


class Attention(nn.Module):
    """`fused`: scaled_dot_product_attention, which no module stands for; otherwise nn.MultiheadAttention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(8, 24)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            q, k, v = (part.view(len(x), -1, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            hidden = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            hidden = self.mha(x, x, x)[0]
        result: Tensor = self.head(hidden.sum(1))
        return result


def gate(z: float) -> Callable[[Tensor], Tensor]:
    return lambda value: mix(value, torch.full((*value.shape[:-1], 1), z), torch.zeros(value.shape[-1]))


def gated(model: nn.Module, address: str, *batch: Any, other: Any, tight: bool = True) -> None:
    """What is asked of every site that works; `usual` is the output while the site is read."""
    site = Site.parse(address)
    with frozen(model), torch.no_grad():
        plain = model(*batch)
        with Tap(model, [site]) as tap:
            usual = model(*batch)
        assert address in tap.values
        torch.testing.assert_close(usual, plain)  # a fused path may add up in another order
        with Tap(model, replace={site: gate(1.0)}):
            assert same_bits(model(*batch), usual)
        with Tap(model, replace={site: gate(0.0)}):
            assert same_bits(model(*batch), model(*other)) == tight
    for z in (0.0, 1.0):
        leaves: list[Tensor] = []

        def replace(value: Tensor, leaves: list[Tensor] = leaves, z: float = z) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return gate(z)(leaves[-1])

        with Tap(model, replace={site: replace}):
            model(*batch).square().sum().backward()
        assert leaves[0].grad is not None
        assert bool(leaves[0].grad.any()) == (z == 1.0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 8)


LAYERS = ["encoder.layers.0:output", "encoder.layers.1.linear1:input", "encoder.layers.0:input", "encoder:output"]
ATTENTION = ["encoder.layers.0.self_attn:output[0]"]


@pytest.mark.parametrize("address", LAYERS + ATTENTION)
@pytest.mark.parametrize("masked", [False, True])
def test_torch_encoders_without_nested_tensors(address: str, masked: bool, x: Tensor) -> None:
    model = Encoder(nested=False).eval()
    before = fingerprint(model)
    mask = (PAD,) if masked else ()
    gated(model, address, x, *mask, other=(torch.randn_like(x), *mask), tight=address in (LAYERS[0], *LAYERS[2:]))
    before.pop("rng")
    after = fingerprint(model)
    after.pop("rng")
    assert after == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("address", LAYERS[:2] + ATTENTION)
def test_nested_tensors_are_refused_with_the_way_out(address: str, x: Tensor) -> None:
    model = Encoder().eval()
    with (
        torch.no_grad(),
        pytest.raises(NotATensorError, match="use_nested_tensor = False"),
        Tap(model, [Site.parse(address)]),
    ):
        model(x, PAD)
    model.encoder.use_nested_tensor = False
    gated(model, address, x, PAD, other=(torch.randn_like(x), PAD), tight=address == LAYERS[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_doctor_of_a_torch_encoder(x: Tensor) -> None:
    """It reports instead of raising: which sites are nested, which are computed by a kernel, what hooks move."""
    model = Encoder().eval()
    addresses = [*LAYERS[:1], *ATTENTION, "encoder.layers.0.self_attn.out_proj:output", "encoder:output"]
    hooked = maskhooks.wrap(model, sites=addresses, perturb=lambda batch, generator: (batch[0].flip(0), batch[1]))
    report = maskhooks.doctor(hooked, (x, PAD))
    troubles = [finding.trouble for finding in report.findings]
    assert ["nested tensor" in trouble for trouble in troubles] == [True, True, False, False]
    assert "takes its weights (a fused path)" in troubles[2]
    assert troubles[3] == ""
    assert report.findings[3].bypassed is False
    assert not report.healthy


def test_doctor_says_how_far_hooks_move_a_fused_path(x: Tensor) -> None:
    model = Encoder(nested=False).eval()
    report = maskhooks.doctor(maskhooks.wrap(model, sites=LAYERS[:1]), (x,))
    with torch.no_grad(), frozen(model):
        plain = model(x)
        with Tap(model, [Site.parse(LAYERS[0])]):
            moved = float((model(x) - plain).abs().max())
    assert report.fused == moved < 1e-5
    assert ("fused: hooks switch off" in str(report)) == (moved > 0)


def test_multihead_attention_as_a_whole(x: Tensor) -> None:
    gated(Attention(fused=False).eval(), "mha:output[0]", x, other=(torch.randn_like(x),))


@pytest.mark.parametrize("address", ["mha:input", "mha:input.value"])
def test_one_of_three_arguments_that_are_one_object(address: str, x: Tensor) -> None:
    """The attention projects three equal arguments in one product, and asks by identity; doctor says so."""
    model = Attention(fused=False).eval()
    with Tap(model, [Site.parse(address)], {Site.parse(address): gate(1.0)}) as tap:
        model(x)
    torch.testing.assert_close(tap.outputs, model(x))
    (finding,) = maskhooks.doctor(maskhooks.wrap(model, sites=[address]), x).findings
    assert finding.trouble.startswith("open gates change the output's bits")


def test_the_inside_of_multihead_attention_is_refused(x: Tensor) -> None:
    model = Attention(fused=False).eval()
    address = "mha.out_proj:output"
    with pytest.raises(SiteNeverFiredError, match="bypassed by a fused path"), Tap(model, [Site.parse(address)]):
        model(x)
    (finding,) = maskhooks.doctor(maskhooks.wrap(model, sites=[address]), x).findings
    assert finding.trouble == (
        "never fired: multi_head_attention_forward takes its weights (a fused path); address the module around it"
    )


@pytest.mark.parametrize("address", ["qkv:output", "head:input"])
def test_around_scaled_dot_product_attention(address: str, x: Tensor) -> None:
    gated(Attention(fused=True).eval(), address, x, other=(torch.randn_like(x),))


# Compiled


@pytest.fixture(autouse=True)
def _dynamo(unchecked: None) -> Iterator[None]:
    """Without the checks of shapes, which PyTorch cannot compile."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


SITE = Site.parse("first:output")
ZERO: dict[Site, Any] = {SITE: torch.zeros_like}


def plain() -> MLP:
    """Frozen and in eval mode already: nothing but the hooks tells PyTorch that compiled code is out of date."""
    return MLP().eval().requires_grad_(False)


def test_compiled_before_wrapping_is_refused() -> None:
    model = compiled(plain())
    with pytest.raises(CompiledModelError, match=r"compiled\._orig_mod"):
        maskhooks.wrap(model, sites=["_orig_mod.first:output"])
    batch = torch.randn(3, 4)
    with maskhooks.wrap(model._orig_mod).tap(replace={"first:output": torch.zeros_like}) as tap:
        model._orig_mod(batch)
    assert same_bits(tap.outputs[0], tap.outputs[1])


def test_compiled_and_run_before_the_tap_never_fires() -> None:
    """Wrapped first, compiled after: code compiled without hooks ignores them, and the tap says so."""
    model, batch = plain(), torch.randn(3, 4)
    fast = compiled(model)
    usual = fast(batch)
    with pytest.raises(SiteNeverFiredError, match="compiled before it was tapped"), Tap(model, replace=ZERO):
        fast(batch)
    with Tap(model, replace=ZERO) as tap:
        model(batch)  # the model itself works
    assert same_bits(tap.outputs[0], tap.outputs[1])
    assert same_bits(fast(batch), usual)


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_while_tapped_works_and_nothing_stays(how: str) -> None:
    model, batch = plain(), torch.randn(3, 4)
    usual = model(batch)
    with Tap(model, [SITE], ZERO) as tap:
        if how == "method":
            model.compile(backend="eager")
        fast = compiled(model) if how == "function" else model
        closed = fast(batch)
    assert same_bits(closed[0], closed[1])
    assert same_bits(tap.values["first:output"], model.first(batch))
    assert same_bits(fast(batch), usual)


def test_two_taps_on_code_compiled_while_tapped() -> None:
    """The second tap's hooks are its own, or it says that they are ignored."""
    model, batch = plain(), torch.randn(3, 4)
    fast = compiled(model)
    with Tap(model, replace=ZERO):
        fast(batch)
    seen: list[Tensor] = []
    try:
        with Tap(model, replace={SITE: lambda value: (seen.append(value), value)[1]}):
            result = fast(batch)
    except SiteNeverFiredError:
        return
    assert len(seen) == 1
    assert same_bits(result, model(batch))


def test_a_compiled_part_beside_the_site() -> None:
    model, batch = plain(), torch.randn(3, 4)
    usual = model(batch)
    model.act = compiled(model.act)
    assert same_bits(model(batch), usual)
    with Tap(model, [SITE], {SITE: gate(1.0)}):
        assert same_bits(model(batch), usual)
    with Tap(model, replace=ZERO):
        assert same_bits(model(batch)[0], model(batch)[1])
    with pytest.raises(CompiledModelError, match="module 'act'"):
        Tap(model, [Site.parse("act:output")])


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_method_that_holds_the_site(warm: bool) -> None:
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.body = compiled(self.slow)

        def slow(self, x: Tensor) -> Tensor:
            return self.first(x).tanh()  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)  # type: ignore[no-any-return]

    model, batch = Fast().eval().requires_grad_(False), torch.randn(3, 4)
    usual = model(batch) if warm else model.slow(batch)
    if warm:
        with pytest.raises(SiteNeverFiredError, match="compiled before"), Tap(model, replace=ZERO):
            model(batch)
    else:
        with Tap(model, replace=ZERO):
            assert not model(batch).any()
    assert same_bits(model(batch), usual)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_models_are_refused(how: str) -> None:
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        done = torch.jit.script(model.first) if how == "script" else torch.jit.trace(model, (torch.randn(3, 4),))
    name = ":output" if how == "script" else "first:output"
    with pytest.raises(CompiledModelError, match="compiled or scripted"):
        maskhooks.wrap(done, sites=[name])


@pytest.mark.parametrize("port", ["input", "output"])
def test_tapped_models_are_not_scripted(port: str) -> None:
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(TappedModelError, match="script it outside"), Tap(model, [Site.parse(f"first:{port}")]) as t:
            torch.jit.script(model.first)
        (port_of_first,) = t._ports.values()
        assert getattr(port_of_first, "__name__", "nameless") == "nameless"  # as before for whoever asks politely
        scripted = torch.jit.script(model.first)
    x = torch.randn(3, 4)
    assert torch.equal(scripted(x), model.first(x))


@pytest.mark.parametrize("how", ["trace", "export"])
def test_tapped_models_are_not_exported(how: str) -> None:
    """What was exported would keep the hooks for good."""
    model, batch = plain(), (torch.randn(3, 4),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TappedModelError, match="trace or export it outside"), Tap(model, replace=ZERO):
            torch.jit.trace(model, batch) if how == "trace" else torch.export.export(model, batch)
        usual = model(*batch)
        clean: Any = torch.jit.trace(model, batch) if how == "trace" else torch.export.export(model, batch).module()
    assert same_bits(clean(*batch), usual)
