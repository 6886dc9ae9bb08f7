"""Replay: a second pass from a site onward equals the full one, whatever the skipped modules do."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.errors import UnknownSiteError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Recording, Replay
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.conftest import fingerprint, same_bits
from tests.models import MLP, Cell, Nested, Noisy, Stack, Tiny


class Count:
    """Counts how often a module's own forward computes (a replaced one does not count)."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        forward = type(module).forward

        def counted(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(this, *args, **kwargs)

        module.__class__ = type(type(module).__name__, (type(module),), {"forward": counted})


def run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def recorded(model: nn.Module, batch: Any, *sites: Site) -> tuple[Replay, Recording, Any]:
    replay = Replay(model)
    replay.trace(lambda: run(model, batch))
    with torch.no_grad(), replay.record(sites) as recording:
        outputs = run(model, batch)
    return replay, recording, outputs


def tensor(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return found


def test_every_site_of_every_model(model: Tiny) -> None:
    """Played without a change, the outputs are the recorded ones; with one, those of a full pass."""
    model.eval()
    sites = [Site.parse(address) for address in model.read()]
    batch = model.example()
    _, recording, outputs = recorded(model, batch, *sites)
    for site in sites:
        with torch.no_grad(), recording.play(site):
            assert same_bits(tensor(run(model, batch)), tensor(outputs)), site
        with torch.no_grad(), Tap(model, replace={site: torch.neg}):
            full = tensor(run(model, batch))
            with recording.play(site):
                assert same_bits(tensor(run(model, batch)), full), site


def test_what_finished_before_the_site_is_skipped() -> None:
    model = Stack().eval()
    counts = [Count(layer) for layer in model.layers]
    site, batch = Site.parse("layers.1:output"), model.example()
    _, recording, _ = recorded(model, batch, site)
    for count in counts:
        count.calls = 0
    with torch.no_grad(), recording.play(site):
        run(model, batch)
    assert [count.calls for count in counts] == [0, 0, 1]


def test_gradients_through_the_replayed_part_are_the_full_passes() -> None:
    model = Cell().eval()
    site, batch = Site.parse("cell@1:output"), model.example()
    _, recording, _ = recorded(model, batch, site)

    def gradient() -> Tensor:
        delta = torch.zeros(2, 4, requires_grad=True)
        with Tap(model, replace={site: lambda value: value + delta}):
            run(model, batch).square().sum().backward()
        assert delta.grad is not None
        return delta.grad

    full = gradient()
    with recording.play(site):
        assert same_bits(gradient(), full)
    assert full.abs().sum() > 0


def test_one_recording_serves_many_sites_and_many_plays() -> None:
    model = Cell().eval()
    sites = [Site.parse(f"cell@{call}:output") for call in range(3)]
    batch = model.example()
    count = Count(model.cell)
    _, recording, outputs = recorded(model, batch, *sites)
    for left, site in zip((2, 1, 0), sites, strict=True):
        for _ in range(2):
            count.calls = 0
            with torch.no_grad(), recording.play(site):
                assert same_bits(run(model, batch), outputs)
            assert count.calls == left


def test_a_module_called_before_and_after_the_site() -> None:
    """Shared modules: what they returned before the site is played, later calls compute."""

    class Shared(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.middle = nn.Linear(4, 4)

        def body(self, x: Tensor) -> Tensor:
            return self.shared(self.middle(self.shared(x)))

    model = Shared().eval()
    site, batch = Site.parse("middle:output"), model.example()
    count = Count(model.shared)
    _, recording, _ = recorded(model, batch, site)
    with torch.no_grad(), Tap(model, replace={site: torch.neg}):
        full = run(model, batch)
        count.calls = 0
        with recording.play(site):
            assert same_bits(run(model, batch), full)
    assert count.calls == 1


def test_a_module_called_alone_and_inside_another() -> None:
    """Skipping the outer one would lose the count of the inner one's calls."""

    class Inside(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.outer = nn.Sequential(nn.Linear(4, 4), self.inner)
            self.last = nn.Linear(4, 4)

        def body(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.outer(x)))

    model = Inside().eval()
    site, batch = Site.parse("last:input"), model.example()
    _, recording, outputs = recorded(model, batch, site)
    with torch.no_grad(), recording.play(site):
        assert same_bits(run(model, batch), outputs)


# What may not be skipped


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


def test_dropout_is_off_while_tracing() -> None:
    """What is learned about the model holds for eval mode, also where the caller is in training mode."""
    model = Noisy()
    assert model.training
    batch, replay = model.example(), Replay(model)
    replay.trace(lambda: run(model, batch))
    assert model.training
    assert model.norm.num_batches_tracked == 0
    with frozen(model), replay.record([Site.parse("last:output")]) as recording:
        assert len(recording.modules()) == 4


def test_trace_runs_once() -> None:
    model, calls = MLP(), []
    replay = Replay(model)
    for _ in range(2):
        replay.trace(lambda: calls.append(model.run()))
    assert len(calls) == 1


def test_untraced_or_unfired_skips_nothing() -> None:
    model = MLP().eval()
    for replay, address in [(Replay(model), "last:output"), (Replay(model), "last@5:output")]:
        if address != "last:output":
            replay.trace(model.run)
        batch = model.example()
        with torch.no_grad(), replay.record([Site.parse(address)]) as recording:
            outputs = run(model, batch)
        with torch.no_grad(), recording.play(Site.parse(address)):
            assert same_bits(run(model, batch), outputs)
        assert recording.modules() == []


def test_another_batch_with_more_steps() -> None:
    """The trace is of the first batch; how often a module ran before the site is seen in each recording."""
    model = Cell().eval()
    replay = Replay(model)
    first = torch.randn(2, 2, 4)
    replay.trace(lambda: model(first))
    site = Site.parse("head:output")
    x = torch.randn(3, 5, 4)
    count = Count(model.cell)
    with torch.no_grad(), replay.record([site]) as recording:
        outputs = model(x)
    count.calls = 0
    with torch.no_grad(), recording.play(site):
        assert same_bits(model(x), outputs)
    assert count.calls == 0


# Hooks and forwards of others


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


def test_playing_ends_with_the_block_also_when_the_model_raises() -> None:
    model = MLP().eval()
    site, batch = Site.parse("last:output"), model.example()
    _, recording, _ = recorded(model, batch, site)
    model.broken = True
    with pytest.raises(RuntimeError, match="on demand"), recording.play(site):
        run(model, batch)
    assert all("forward" not in vars(module) for module in model.modules())


def test_arguments_are_found_by_name_while_playing() -> None:
    model = MLP().eval()
    _, recording, _ = recorded(model, model.example(), Site.parse("last:output"))
    with recording.play(Site.parse("last:output")), Tap(model, read=[Site.parse("first:input.input")]) as tap:
        run(model, model.example())
    assert "first:input.input" in tap.values


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


def test_nested_outputs_are_played() -> None:
    model = Nested().eval()
    count = Count(model.parts)
    site, batch = Site.parse("head:input"), model.example()
    _, recording, outputs = recorded(model, batch, site)
    count.calls = 0
    with torch.no_grad(), recording.play(site):
        result = run(model, batch)
    assert same_bits(result.hidden["triple"], outputs.hidden["triple"])
    assert count.calls == 0


def test_unknown_module() -> None:
    model = MLP()
    replay = Replay(model)
    replay.trace(model.run)
    with (
        pytest.raises(UnknownSiteError, match=r"'lst'.*Did you mean 'last'"),
        replay.record([Site.parse("lst:output")]),
    ):
        pass
