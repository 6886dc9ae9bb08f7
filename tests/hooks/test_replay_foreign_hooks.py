"""Replay beside hooks and forwards of others: each is applied once, and is put back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.sites.site import Site
from tests.conftest import fingerprint, same_bits
from tests.hooks.recordings import recorded, run
from tests.models import Cell, Stack


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_foreign_hooks_are_applied_once(prepend: bool, everywhere: bool) -> None:
    model = Cell().eval()

    def adds(module: nn.Module, args: object, output: Any) -> Any:
        return output + 1 if module is model.cell else None

    if everywhere:
        handle = torch.nn.modules.module.register_module_forward_hook(adds)
    else:
        handle = model.cell.register_forward_hook(adds, prepend=prepend)
    try:
        site, batch = Site.parse("cell@1:output"), model.example()
        _, recording, outputs = recorded(model, batch, site)
        with torch.no_grad(), recording.play(site):
            assert same_bits(run(model, batch), outputs)
        assert bool(recording.modules()) is not everywhere
    finally:
        handle.remove()


def test_a_hook_that_edits_in_place() -> None:
    model = Stack().eval()

    def adds(module: nn.Module, args: object, output: Tensor) -> None:
        output.add_(1)

    model.layers[0].register_forward_hook(adds)
    site, batch = Site.parse("layers.2:output"), model.example()
    _, recording, outputs = recorded(model, batch, site)
    for _ in range(2):
        with torch.no_grad(), recording.play(site):
            assert same_bits(run(model, batch), outputs)


def test_an_instances_own_forward_is_put_back() -> None:
    """As accelerate sets it: an attribute of the instance, not of the class."""
    model = Stack().eval()
    layer = model.layers[0]
    usual = layer.forward

    def placed(x: Tensor) -> Tensor:
        return 2 * usual(x)

    layer.forward = placed  # type: ignore[method-assign]
    before = fingerprint(model)
    site, batch = Site.parse("layers.1:output"), model.example()
    torch.set_rng_state(torch.tensor(before["rng"], dtype=torch.uint8))
    _, recording, outputs = recorded(model, batch, site)
    with torch.no_grad(), recording.play(site):
        assert "forward" in vars(model.layers[1])
        assert vars(layer)["forward"] is not placed
        assert same_bits(run(model, batch), outputs)
    assert vars(layer)["forward"] is placed
    assert "forward" not in vars(model.layers[1])
    assert fingerprint(model) == before
