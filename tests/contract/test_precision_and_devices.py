"""Numbers and places: half precision, autocast, offloaded weights, meta and quantised ones: right, or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.checks.site_checks import owners
from maskhooks.errors import GradientError, ModelError
from maskhooks.hooks.tap import Tap
from maskhooks.masks.mix import mix
from maskhooks.sites.site import Site
from tests.conftest import same_bits


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)).eval()


def gates(model: nn.Module, x: Tensor, address: str, width: int) -> None:
    """Open gates change no bit, closed ones let nothing through, and gates learn in float32."""
    site = Site.parse(address)
    with torch.no_grad():
        usual, other = model(x), model(-x)
    assert not same_bits(usual, other)
    for z in (0.0, 1.0):
        sample, baseline = torch.full((len(x), 1), z, requires_grad=True), torch.zeros(width, requires_grad=True)
        seen: list[Tensor] = []

        def replace(value: Tensor, z: Any = sample, b: Any = baseline, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value.detach().requires_grad_())
            return mix(seen[-1], z, b)

        with Tap(model, [site], {site: replace}) as tap:
            result = model(x)
            result.float().square().sum().backward()
        assert tap.values[address].dtype == seen[0].dtype
        with torch.no_grad(), Tap(model, replace={site: replace}):
            assert same_bits(model(x), usual) == (z == 1.0)
            assert same_bits(model(x), model(-x)) == (z == 0.0)
        assert seen[0].grad is not None
        assert bool(seen[0].grad.any()) == (z == 1.0)
        assert sample.grad is not None
        assert sample.grad.dtype == torch.float32
        assert sample.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("address", "width"), [("0:output", 5), ("1:input", 5), ("2:output", 5), (":input", 4)])
def test_precisions(dtype: torch.dtype, address: str, width: int) -> None:
    gates(network().to(dtype), torch.randn(3, 4).to(dtype), address, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("address", ["0:output", "1:output", "3:input"])
def test_autocast(dtype: torch.dtype, address: str) -> None:
    with torch.autocast("cpu", dtype):
        gates(network(), torch.randn(3, 4), address, 5)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("kind", ["cpu", "disk", "parts"])
def test_weights_offloaded_by_accelerate(kind: str, tmp_path: Path) -> None:
    import accelerate

    torch.manual_seed(1)
    model, x = network(), torch.randn(3, 4)
    with torch.no_grad():
        usual = model(x)
    if kind == "parts":
        places = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "disk"}
        accelerate.dispatch_model(model, places, "cpu", offload_dir=str(tmp_path), force_hooks=True)
    elif kind == "disk":
        accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, torch.device("cpu"))
    assert any(weight.is_meta for weight in model.parameters())
    flags = [(name, weight.device.type, weight.requires_grad) for name, weight in model.named_parameters()]
    with Tap(model, [Site.parse("0:output")]) as tap:
        model(x)
    assert same_bits(tap.outputs, usual)
    gates(model, x, "0:output", 5)
    assert [(n, w.device.type, w.requires_grad) for n, w in model.named_parameters()] == flags
    assert owners(model[0]) == ["accelerate"]
    hooked = maskhooks.wrap(model, sites={"0:output": "batch hidden -> batch"})
    assert maskhooks.doctor(hooked, x).healthy
    assert [(n, w.device.type, w.requires_grad) for n, w in model.named_parameters()] == flags


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_were_never_loaded(whole: bool) -> None:
    model = network()
    model[3].to("meta")
    x = torch.randn(3, 4)
    if whole:
        model.to("meta")
        x = x.to("meta")
    address = "0:output" if whole else "3:output"
    kind: Any = {"read": [Site.parse(address)]}
    for settings in (kind, {"replace": {Site.parse(address): torch.neg}}):
        with pytest.raises((ModelError, RuntimeError), match="meta"), Tap(model, **settings):
            model(x)
    if whole:
        with pytest.raises(ModelError, match=r"has a shape but no data.*from_pretrained"), Tap(model, **kind):
            model(x)


def test_some_weights_on_the_meta_device() -> None:
    """PyTorch's own error comes before any value; it is told which weights were never loaded."""
    model = network()
    model[3] = nn.Linear(5, 2, device="meta")
    hooked = maskhooks.wrap(model, sites={"0:output": "batch hidden -> batch"}, output=rows)
    with pytest.raises(ModelError, match=r"2 of its weights, such as '3\.weight', are on the meta device") as caught:
        hooked(torch.randn(3, 4))
    assert caught.value.module == "3"
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # another error stays the model's own
        hooked(torch.randn(3, 7))


def rows(logits: Tensor) -> Categorical:
    return Categorical(logits=20 * logits)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of quantised modules
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch without such kernels")
def test_free_gates_before_quantised_modules_are_refused() -> None:
    """Without a gradient they would all close, whatever that does."""
    model = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8)
    hooked = maskhooks.wrap(model, sites={"1:output": "batch hidden -> batch"}, output=rows)
    made = maskhooks.DiffMask(hooked, "1:output", margin=0.1, amortized=False, recipe=maskhooks.Recipe(steps=2))
    with pytest.raises(GradientError, match="no gradient comes back: it is zero everywhere"):
        made.explain(3 * torch.randn(8, 4))


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of quantised tensors
def test_quantised_values() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounded, self.head = nn.Identity(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            value = self.rounded(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
            result: Tensor = self.head(value.dequantize())
            return result

    hooked = maskhooks.wrap(Rounded(), sites={"rounded:output": "batch hidden -> batch"}, output=rows)
    with torch.no_grad(), hooked.tap(read="rounded:output") as tap:
        hooked(torch.randn(3, 4))
    assert tap.values["rounded:output"].dtype == torch.qint8
    (found,) = maskhooks.doctor(hooked, torch.randn(3, 4)).findings
    assert found.trouble == "its values are torch.qint8, but masks are learned on floating-point values"
    assert found.bypassed is False


def test_weights_of_whole_numbers() -> None:
    """As weight-only quantisation has them: the values are floating-point ones, and so are gradients."""

    class Whole(nn.Module):
        def __init__(self, width: int, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (size, width), dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.to(x.dtype) / 9).T

    model = nn.Sequential(Whole(4, 5), nn.GELU(), Whole(5, 2))
    gates(model, torch.randn(3, 4), "0:output", 5)
    hooked = maskhooks.wrap(model, sites={"0:output": "batch hidden -> batch"}, output=rows)
    assert maskhooks.doctor(hooked, torch.randn(3, 4)).healthy
