"""What a module's forward takes, also where something stands in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import maskhooks
from maskhooks.hooks.replay import forwards
from maskhooks.hooks.tap import Tap
from maskhooks.sites.signature import signature
from maskhooks.sites.site import Site


class Layer(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale


class Static(nn.Module):
    @staticmethod
    def forward(x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return outer


class Decorated(nn.Module):
    @decorated
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale


class Instead:
    """Stands in the place of a forward, and carries what the class has."""

    def __init__(self, module: nn.Module, wrapped: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self.run = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def of_class(module: nn.Module) -> None:
    vars(module)["forward"] = Instead(module, type(module).forward)


def of_instance(module: nn.Module) -> None:
    vars(module)["forward"] = functools.update_wrapper(functools.partial(module.forward), module.forward)


def twice(module: nn.Module) -> None:
    of_class(module)
    of_instance(module)


def nothing(module: nn.Module) -> None:
    pass


@pytest.mark.parametrize("place", [nothing, of_class, of_instance, twice])
@pytest.mark.parametrize("kind", [Layer, Decorated])
def test_whatever_stands_there_takes_what_the_class_takes(
    kind: Callable[[], nn.Module], place: Callable[[nn.Module], None]
) -> None:
    module = kind()
    place(module)
    assert list(signature(module).parameters) == ["x", "scale"]
    with forwards([module]):
        assert list(signature(module).parameters) == ["x", "scale"]
    x = torch.ones(2, 3)
    hooked = maskhooks.wrap(module, sites=[":input.x"])
    with hooked.tap(read=":input.x") as tap:
        assert torch.equal(hooked({"x": x, "scale": 3.0}), 3 * x)
        assert torch.equal(tap.values[":input.x"], x)
        assert torch.equal(hooked((x, 4.0, "label")), 4 * x)
    for address, call in ((":input[0]", {"x": x}), (":input[1]", {"x": x, "scale": torch.tensor(3.0)})):
        with Tap(module, [Site.parse(address)]) as by_position:
            module(**call)
        assert torch.equal(by_position.values[address], list(call.values())[-1])


def test_a_static_forward_and_one_of_other_arguments() -> None:
    assert list(signature(Static()).parameters) == ["x", "scale"]
    module = Layer()
    vars(module)["forward"] = lambda y: y + 1
    assert list(signature(module).parameters) == ["y"]


def test_a_module_that_passes_on_what_it_is_given() -> None:
    assert list(signature(AveragedModel(Layer())).parameters) == ["x", "scale"]
    assert list(signature(nn.DataParallel(AveragedModel(Layer()))).parameters) == ["x", "scale"]
    alone = nn.Module()
    assert list(signature(alone).parameters) == ["input"]
