"""The modules of a model by name, and those that it holds without listing them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskhooks
from maskhooks.errors import UnknownSiteError
from maskhooks.hooks.frozen import frozen
from maskhooks.sites.modules import Modules, running
from tests.conftest import fingerprint, same_bits


class Named(nn.Module):
    """Gives a module a second name by attribute, as TransformerLens does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.size = 4

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("inner" if name == "hook_post" else name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class Bridge(nn.Module):
    """Runs a model that it does not register, though it does some of its parts."""

    def __init__(self) -> None:
        super().__init__()
        original = nn.Sequential(Named(), nn.Dropout(0.5), nn.Linear(4, 2, bias=False))
        vars(self)["original"] = original
        self.blocks = nn.ModuleList([original[0]])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = vars(self)["original"](x)
        return out


def test_names_that_only_attributes_lead_to() -> None:
    model = Bridge()
    modules = Modules(model)
    assert list(modules) == [name for name, _ in model.named_modules()] == ["", "blocks", "blocks.0", "blocks.0.inner"]
    assert len(modules) == 4
    assert modules["blocks.0.hook_post"] is modules["blocks.0.inner"] is model.blocks[0].inner  # type: ignore[union-attr]
    assert modules[""] is model
    for name in ("blocks.0.size", "blocks.1", "blocks.0.hook_pre", "blocks.0.hook_post.more"):
        assert name not in modules
        with pytest.raises(KeyError):
            modules[name]


def test_such_names_are_sites() -> None:
    model, x = Bridge().eval(), torch.randn(2, 3)
    vars(model)["original"].eval()
    address = "blocks.0.hook_post:output"
    hooked = maskhooks.wrap(model, sites={address: "batch hidden -> batch"}, example=x)
    with hooked.tap(read=[address, "blocks.0.inner:output"]) as tap:
        hooked(x)
    assert same_bits(tap.values[address], tap.values["blocks.0.inner:output"])
    with torch.no_grad(), maskhooks.wrap(model).tap(replace={address: torch.zeros_like}):
        assert not hooked(x).any()
    assert maskhooks.doctor(hooked, x).healthy
    with pytest.raises(UnknownSiteError, match=r"blocks\.0\.inner:output"):
        hooked.find("blocks.0.iner:output")
    with pytest.raises(UnknownSiteError, match=r"no module 'blocks\.0\.size'"):
        maskhooks.wrap(model, sites=["blocks.0.size:output"])


def test_unlisted_modules_are_in_eval_mode_and_frozen_too() -> None:
    model, x = Bridge(), torch.randn(64, 3)
    original: nn.Sequential = vars(model)["original"]
    before = fingerprint(model), fingerprint(original)
    assert [type(module).__name__ for module in running(model)] == [
        *("Bridge", "ModuleList", "Named", "Linear", "Sequential", "Dropout", "Linear")
    ]
    with maskhooks.wrap(model, sites=["blocks.0:output"]).tap(read="blocks.0:output") as tap:
        assert not original.training
        assert not original[1].training
        assert not original[2].weight.requires_grad
        assert torch.equal(model(x), model(x))
        assert not tap.outputs.requires_grad
    assert (fingerprint(model), fingerprint(original)) == before
    with frozen(original), frozen(model):
        assert not original[1].training
    assert (fingerprint(model), fingerprint(original)) == before
