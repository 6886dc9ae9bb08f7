"""Shared by all tests: shapes in annotations are enforced, one thread, tiny models, a model's fingerprint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

_shapes = jaxtyping.install_import_hook("maskhooks", "beartype.beartype")  # before maskhooks is imported

from tests import models  # noqa: E402

torch.set_num_threads(1)
# A job that a shell put in the background ignores Ctrl-C, and so would every process started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches off the shapes' check, which would answer a user's mistake before our own error does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def early_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress gets its first line at once."""
    monkeypatch.setattr("maskhooks.progress._FIRST", 0.0)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers: NaN equals itself, -0.0 differs from 0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that must be the same before and after: bits, flags, attributes and hooks of modules, the RNG."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name} training"] = module.training
        for key, value in vars(module).items():
            held = list(value.items()) if isinstance(value, dict) else value
            found[f"{name} {key}"] = (id(value), held if isinstance(held, list) else None)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{name} {key} bits"] = bits(tensor).tolist()
                found[f"{name} {key} flags"] = (id(tensor), tensor.requires_grad, tensor.grad, tensor.is_leaf)
    return found


@pytest.fixture(params=models.ALL, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> models.Tiny:
    """Each tiny model in turn, in training mode, with every other weight frozen and one fixed example."""
    made: models.Tiny = request.param()
    for weight in list(made.parameters())[::2]:
        weight.requires_grad_(False)
    example = made.example()
    made.example = lambda: example  # type: ignore[method-assign]
    return made


@pytest.fixture
def unchanged() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Call it with a model: after the test the model must be as it was then, bit for bit."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []

    def watch(model: nn.Module) -> nn.Module:
        before.append((model, fingerprint(model)))
        return model

    yield watch
    for model, found in before:
        assert fingerprint(model) == found
