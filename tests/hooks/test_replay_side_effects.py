"""Replay: modules that write, draw or change values in place compute again, and their values are the right ones."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.sites.site import Site
from tests.conftest import same_bits
from tests.hooks.recordings import Count, recorded, run
from tests.models import MLP, Tiny


class Writes(Tiny):
    """A model whose first module, `writer`, does something besides computing."""

    def __init__(self, writer: nn.Module) -> None:
        super().__init__()
        self.writer = writer
        self.last = nn.Linear(4, 4)


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x + self.steps


class NewBuffer(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return x + self.steps


class Attribute(nn.Module):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x + self.steps


class History(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x + len(self.seen)


class Held(nn.Module):
    """Writes to an object that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = types.SimpleNamespace(states=[torch.zeros(())])

    def forward(self, x: Tensor) -> Tensor:
        self.cache.states[0] = self.cache.states[0] + 1
        return x + self.cache.states[0]


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=self.generator)


class Weight(nn.Module):
    """Normalises its own weight at each call, as spectral norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


@pytest.mark.parametrize("writer", [Buffer, NewBuffer, Attribute, History, Held, Draws, Weight])
@pytest.mark.parametrize("inside", [False, True])
def test_modules_that_write_compute_again(writer: type[nn.Module], inside: bool) -> None:
    """Their second effect must not be lost: the second pass gives what a full second pass gives."""

    class Model(Writes):
        def body(self, x: Tensor) -> Tensor:
            return self.last(self.writer(x))

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), writer()) if inside else writer()
    model = Model(module).eval()
    twin = copy.deepcopy(model)
    site, batch = Site.parse("last:input"), model.example()
    _, recording, _ = recorded(model, batch, site)
    with torch.no_grad(), recording.play(site):
        played = run(model, batch)
    with torch.no_grad():
        *_, third = (run(twin, batch) for _ in range(3))
    assert same_bits(played, third)


def test_a_cache_handed_in_is_written_again() -> None:
    """Skipping a layer that fills a cache would give equal outputs and an empty cache, without an error."""

    class Cache:
        __slots__ = ("states",)  # nothing inside can be seen from outside

        def __init__(self) -> None:
            self.states: list[Tensor] = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, cache: Any) -> Tensor:
            key = self.linear(x)
            if isinstance(cache, Cache):
                cache.states.append(key)
            elif isinstance(cache, list):
                cache.append(key)
            elif isinstance(cache, dict):
                cache[len(cache)] = key
            elif isinstance(cache, Tensor):
                cache[len(x) :] = key
            return key

    class Model(Writes):
        def body(self, x: Tensor, make: Callable[[], Any]) -> Tensor:
            self.cache = make()
            return self.last(self.writer(x, self.cache))

    for make in (Cache, list, dict, lambda: torch.zeros(6, 4)):
        model = Model(Layer()).eval()
        count = Count(model.writer)
        inner = Count(model.writer.linear)
        site, batch = Site.parse("last:output"), (torch.randn(3, 4), make)
        _, recording, outputs = recorded(model, batch, site)
        count.calls = inner.calls = 0
        with torch.no_grad(), recording.play(site):
            assert same_bits(run(model, batch), outputs)
        full = model.cache
        assert count.calls == 1
        assert inner.calls == 0  # what is inside and only computes is skipped
        if isinstance(full, Tensor):
            assert full[3:].abs().sum() > 0
        else:
            assert len(getattr(full, "states", full)) == 1


def test_a_cache_handed_in_only_after_the_trace() -> None:
    class Cache:
        def __init__(self) -> None:
            self.states: list[Tensor] = []

    class Layer(nn.Module):
        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            if cache is not None:
                cache.states.append(x)
            return 2 * x

    class Model(Writes):
        def body(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            return self.last(self.writer(x, cache))

    model, x = Model(Layer()).eval(), torch.randn(3, 4)
    site = Site.parse("last:output")
    replay, _, _ = recorded(model, (x,), site)
    with torch.no_grad(), replay.record([site]) as recording:
        model(x, Cache())
    cache = Cache()
    with torch.no_grad(), recording.play(site):
        model(x, cache)
    assert len(cache.states) == 1


def test_a_cache_handed_in_at_one_call_of_two() -> None:
    """Playing the plain call only would give its value to the other one."""

    class Layer(nn.Module):
        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            return x + 1 if cache is None else x * 2

    class Model(Writes):
        cache: object = None

        def body(self, x: Tensor) -> Tensor:
            return self.last(self.writer(self.writer(x, self.cache)))

    model = Model(Layer()).eval()
    site, batch = Site.parse("last:input"), model.example()
    replay, _, _ = recorded(model, batch, site)
    model.cache = object()
    with torch.no_grad(), replay.record([site]) as recording:
        outputs = run(model, batch)
    with torch.no_grad(), recording.play(site):
        assert same_bits(run(model, batch), outputs)


def test_in_place_changes() -> None:
    """A module that changes its argument in place runs again, on a copy of what was recorded."""

    class InPlace(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.relu = nn.ReLU(inplace=True)
            self.drop = nn.Dropout()
            self.last = nn.Linear(4, 4)

        def body(self, x: Tensor) -> Tensor:
            h = self.first(x)
            same = self.drop(h)  # in eval mode its argument itself
            self.relu(h)  # the result is not used
            h += 1
            return self.last(h + same)

    model = InPlace().eval()
    batch = model.example()
    count = Count(model.first)
    for address in ["last:input", "last:output"]:
        site = Site.parse(address)
        _, recording, outputs = recorded(model, batch, site)
        count.calls = 0
        for _ in range(3):
            with torch.no_grad(), recording.play(site):
                assert same_bits(run(model, batch), outputs)
        assert count.calls == 0


def test_a_buffer_returned_and_then_written_to() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slots", torch.zeros(3, 4))

        def forward(self) -> Tensor:
            return self.slots

    class Model(Writes):
        def body(self, x: Tensor) -> Tensor:
            slots = self.writer()
            slots += x
            return self.last(slots)

    model = Model(Static()).eval()
    site, x = Site.parse("last:output"), torch.ones(3, 4)
    _, recording, _ = recorded(model, (x,), site)
    with torch.no_grad(), recording.play(site):
        model(x)
    assert model.writer.slots.eq(3).all()  # traced, recorded, played


def test_nothing_is_skipped_in_a_model_that_draws() -> None:
    class Random(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(4, 4)

        def body(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + torch.rand(4))

    model = Random().eval()
    _, recording, _ = recorded(model, model.example(), Site.parse("last:output"))
    assert recording.modules() == []


def test_overwritten_values_are_not_played() -> None:
    """A recorded tensor that someone changes in place later is dropped; its module computes again."""
    model = MLP().eval()
    site, batch = Site.parse("last:input"), model.example()
    kept: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, output: kept.append(output))
    _, recording, outputs = recorded(model, batch, site)
    kept[-1].zero_()
    with torch.no_grad(), recording.play(site):
        assert same_bits(run(model, batch), outputs)


def test_under_inference_mode_nothing_is_kept() -> None:
    """Inference tensors have no version, and cannot be trained on."""
    model = MLP().eval()
    batch, site = model.example(), Site.parse("last:input")
    with torch.inference_mode():
        _, recording, outputs = recorded(model, batch, site)
        with recording.play(site):
            assert same_bits(run(model, batch), outputs)
    assert recording.returns == {}
