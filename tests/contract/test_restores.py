"""Invariant 1: the model comes back as it was, bit for bit, in success and in failure."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskhooks
from maskhooks.errors import ReplacementError, SiteNeverFiredError, TappedModelError, UnknownSiteError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.replay import Replay
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.conftest import fingerprint, same_bits
from tests.models import Broken, Cell, Noisy, Stack, Tiny

Action = Callable[[Tiny, list[Site]], Any]


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def apart(sites: list[Site], function: Replacement) -> dict[Site, Replacement]:
    """A replacement at one site of each port and call."""
    first = {(site.module, site.port, site.call): site for site in reversed(sites)}
    return dict.fromkeys(first.values(), function)


def reads(model: Tiny, sites: list[Site]) -> None:
    with Tap(model, read=sites):
        model.run()


def reads_without_grad(model: Tiny, sites: list[Site]) -> None:
    with Tap(model, read=sites), torch.no_grad():
        model.run()


def replaces(model: Tiny, sites: list[Site]) -> None:
    with Tap(model, replace=apart(sites, torch.zeros_like)):
        model.run()


def reads_and_replaces(model: Tiny, sites: list[Site]) -> None:
    with Tap(model, read=sites, replace=apart(sites, torch.zeros_like)):
        model.run()


def replaces_with_the_wrong_shape(model: Tiny, sites: list[Site]) -> None:
    with Tap(model, replace=apart(sites, lambda value: value[..., :1])):
        model.run()


def nests(model: Tiny, sites: list[Site]) -> None:
    with Tap(model, read=sites), Tap(model, replace=apart(sites, torch.neg)), frozen(model):
        model.run()


def interleaves(model: Tiny, sites: list[Site]) -> None:
    outer, inner = Tap(model, read=sites), Tap(model, read=sites)
    outer.__enter__()
    inner.__enter__()
    try:
        model.run()
    finally:
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)


def traces(model: Tiny, sites: list[Site]) -> None:
    batch = model.example()
    Replay(model).trace(lambda: call(model, batch))


def records_and_plays(model: Tiny, sites: list[Site]) -> None:
    batch, replay = model.example(), Replay(model)
    with frozen(model), torch.no_grad():
        broken, model.broken = model.broken, False
        replay.trace(lambda: call(model, batch))
        with replay.record(sites) as recording:
            call(model, batch)
        model.broken = broken
        with recording.play(sites[-1]):
            call(model, batch)


def records(model: Tiny, sites: list[Site]) -> None:
    batch, replay = model.example(), Replay(model)
    with frozen(model), torch.no_grad():
        broken, model.broken = model.broken, False
        replay.trace(lambda: call(model, batch))
        model.broken = broken
        with replay.record(sites):
            call(model, batch)


def wraps(model: Tiny, sites: list[Site]) -> None:
    maskhooks.wrap(model, sites=sites, example=model.example(), call=call)


def taps_hooked(model: Tiny, sites: list[Site]) -> None:
    hooked = maskhooks.wrap(model, sites=sites, call=call)
    with hooked.tap(read=[str(site) for site in sites]):
        hooked(model.example())


ACTIONS = [
    reads,
    reads_without_grad,
    replaces,
    reads_and_replaces,
    nests,
    interleaves,
    traces,
    records,
    records_and_plays,
    wraps,
    taps_hooked,
]


@pytest.fixture(params=ACTIONS, ids=lambda action: action.__name__)
def action(request: pytest.FixtureRequest) -> Action:
    found: Action = request.param
    return found


def sites_of(model: Tiny) -> list[Site]:
    return [Site.parse(address) for address in model.read()]


def test_fine(model: Tiny, action: Action, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    unchanged(model)
    action(model, sites_of(model))


def test_model_raises(model: Tiny, action: Action, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    model.broken = True
    unchanged(model)
    with pytest.raises(Broken):
        action(model, [site for site in sites_of(model) if site.module])


@pytest.mark.parametrize("action", [action for action in ACTIONS if action is not traces])
def test_module_that_does_not_exist(model: Tiny, action: Action, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    unchanged(model)
    with pytest.raises(UnknownSiteError, match="'nowhere'"):
        action(model, [Site.parse("nowhere:output")])


@pytest.mark.parametrize("action", [reads, replaces, nests, interleaves, wraps, taps_hooked])
def test_call_that_never_comes(model: Tiny, action: Action, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    unchanged(model)
    with pytest.raises(SiteNeverFiredError, match="@7:output"):
        action(model, [Site.parse("@7:output")])


def test_bad_replacement(model: Tiny, unchanged: Callable[[nn.Module], nn.Module]) -> None:
    unchanged(model)
    with pytest.raises(ReplacementError, match="the replacement is"):
        replaces_with_the_wrong_shape(model, sites_of(model))


class Foreign:
    """Hooks of another library, of every kind."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[str] = []
        module.register_forward_hook(self.note("hook"))
        module.register_forward_hook(self.note("first"), prepend=True)
        module.register_forward_hook(self.note("kwargs"), with_kwargs=True)
        module.register_forward_hook(self.note("always"), always_call=True)
        module.register_forward_pre_hook(self.note("pre"))
        module.register_forward_pre_hook(self.note("pre first"), prepend=True)

    def note(self, name: str) -> Callable[..., None]:
        return lambda *_: self.seen.append(name)


@pytest.mark.parametrize("broken", [False, True])
def test_foreign_hooks_stay(model: Tiny, action: Action, broken: bool) -> None:
    """The fingerprint holds every hook dictionary in order; and they still fire as they did."""
    foreign = [Foreign(module) for module in model.modules()]
    model.run()
    usual = [hook.seen[:] for hook in foreign]
    for hook in foreign:
        hook.seen.clear()
    model.broken = broken
    before = fingerprint(model)
    try:
        action(model, [site for site in sites_of(model) if site.module and site.port == "output"])
    except Broken:
        assert broken
    rng = before.pop("rng")
    after = fingerprint(model)
    after.pop("rng")
    assert after == before
    del rng
    model.broken = False
    for hook in foreign:
        hook.seen.clear()
    model.run()
    assert [hook.seen for hook in foreign] == usual


def test_foreign_hook_that_raises_first() -> None:
    """Our count of passes must survive a pass that another library's hook ends before it begins."""
    model = Stack()

    def raises(*_: Any) -> None:
        raise Broken

    before = fingerprint(model)
    with Tap(model, read=[Site.parse("head:output")]) as tap:
        handle = torch.nn.modules.module.register_module_forward_pre_hook(raises)
        with pytest.raises(Broken):
            model.run()
        handle.remove()
        for _ in range(2):
            model.run()
            assert list(tap.values) == ["head:output"]
    before.pop("rng")
    after = fingerprint(model)
    after.pop("rng")
    assert after == before


def test_training_mode_and_grad_flags_come_back_one_by_one() -> None:
    model = Noisy()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert [weight.requires_grad for weight in model.parameters()] == [False, True, True, True, True, True]


def test_eval_mode_is_the_same_as_the_users_own() -> None:
    model = Noisy()
    x = torch.randn(3, 4)
    with Tap(model, read=[Site.parse("last:output")]) as tap:
        model(x)
    model.eval()
    assert same_bits(tap.outputs, model(x))


def test_train_method_of_the_user_is_not_called() -> None:
    """A model may override `train` to keep parts in eval mode; flags are set directly."""

    class Stubborn(Noisy):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError("train was called")

    model = Stubborn()
    with Tap(model, read=[Site.parse("last:output")]):
        model.run()
    assert model.norm.training


def test_frozen_on_overlapping_models_in_any_order() -> None:
    model = Noisy()
    outer, inner = frozen(model), frozen(model.norm)
    inner.__enter__()
    outer.__enter__()
    inner.__exit__(None, None, None)
    assert not model.norm.training
    assert not model.norm.weight.requires_grad
    outer.__exit__(None, None, None)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_deepcopy_and_pickle_work_again_after_a_tap() -> None:
    model = Stack()
    with Tap(model, read=[Site.parse("head:output")]):
        model.run()
    tokens = torch.randint(0, 10, (2, 3))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(twin(tokens), model(tokens))


@pytest.mark.parametrize("how", ["tap", "record", "play", "trace"])
def test_copying_while_hooked_raises(how: str) -> None:
    """A copy would keep our hooks and replaced forwards for good."""
    model, tokens = Stack(), torch.randint(0, 10, (2, 3))
    site, replay = Site.parse("layers.2:output"), Replay(model)

    def copies() -> None:
        for attempt in (
            lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model),
            lambda: torch.save(model, io.BytesIO()),
        ):
            with pytest.raises(TappedModelError, match="outside the `with"):
                attempt()

    if how == "tap":
        with Tap(model, read=[site]):
            copies()
            model(tokens)
    elif how == "trace":
        replay.trace(lambda: (copies(), model(tokens)))
    else:
        replay.trace(lambda: model(tokens))
        with replay.record([site]) as recording:
            if how == "record":
                copies()
            model(tokens)
        with recording.play(site):
            if how == "play":
                copies()


def test_generators_may_close_late_and_in_any_order() -> None:
    model, tokens = Stack(), torch.randint(0, 10, (2, 3))
    before = fingerprint(model)

    def values(address: str) -> Iterator[Tensor]:
        with Tap(model, read=[Site.parse(address)]) as tap:
            while True:
                model(tokens)
                yield tap.values[address]

    first, second = values("embed:output"), values("head:output")
    assert next(first).shape == (2, 3, 4)
    assert next(second).shape == (2, 2)
    first.close()
    assert next(second).shape == (2, 2)
    assert not model.training
    second.close()
    assert fingerprint(model) == before


def test_interrupt_within_the_block() -> None:
    model = Cell()
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt), Tap(model, read=[Site.parse("head:output")]):
        raise KeyboardInterrupt
    assert fingerprint(model) == before


def test_wrap_leaves_the_rng_of_a_model_that_draws() -> None:
    class Draws(Tiny):
        def body(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = Draws()
    example = model.example()
    before = fingerprint(model)
    maskhooks.wrap(model, sites={":output": "batch feature -> batch"}, example=example)
    assert fingerprint(model) == before
