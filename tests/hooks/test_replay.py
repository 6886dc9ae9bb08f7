"""Replay: a second pass from a site onward equals the full one, and computes only what comes after the site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskhooks.errors import UnknownSiteError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.conftest import same_bits
from tests.hooks.recordings import Count, recorded, run, tensor
from tests.models import MLP, Cell, Nested, Noisy, Stack, Tiny


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
