"""Values that come in portions: below each other, replaced portion by portion, refused where they do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import maskhooks
from maskhooks.errors import NotATensorError, ReplacementError
from maskhooks.hooks.port import Point
from maskhooks.hooks.several_parts import Parts, PartsPort, PicksPort
from maskhooks.masks.baselines import Zero
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.model.adapter import Adapter, join
from maskhooks.model.hooked import Hooked
from maskhooks.sites.modules import places
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site
from tests.conftest import same_bits


class Chunks(nn.Module):
    """Doubles its input in portions of two rows, each on top of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.through: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        done: list[Tensor] = []
        for part in x.split(2):
            part = 2 * part + (done[-1].sum() if done else 0)
            for place in self.through:
                part = place(part)
            done.append(part)
        return torch.cat(done)


class ChunksAdapter(Adapter):
    name = "chunks"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (Chunks,)

    def sites(self, name: str, module: nn.Module) -> Iterable[Site]:
        return [Site(join(name, "part"), pattern=Pattern("row feature -> row"))]

    def places(self, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"part": Parts()}

    @contextlib.contextmanager
    def expose_sites(self, name: str, module: nn.Module, sites: Sequence[Site]) -> Iterator[None]:  # type: ignore[override]
        assert isinstance(module, self.types())
        module.through.append(places(module)["part"])
        try:
            yield
        finally:
            module.through.pop()


@pytest.fixture
def hooked() -> Hooked:
    return maskhooks.wrap(Chunks(), adapter=ChunksAdapter)


X = torch.arange(10.0).view(5, 2)
SITE, SECOND = "part:output", "part@1:output"


def test_portions_are_read_as_one_value_or_by_call(hooked: Hooked) -> None:
    with hooked.tap(read=[SITE, SECOND, "part@*:output"]) as tap:
        whole = hooked(X)
        assert torch.equal(tap.values[SITE], whole)
        assert torch.equal(tap.values[SECOND], whole[2:4])
        assert torch.equal(tap.values["part@2:output"], whole[4:])
    with hooked.tap(read=SITE) as tap:
        hooked(X)
        assert len(hooked(X[:3])) == len(tap.values[SITE]) == 3  # a later pass has fewer


def test_a_replacement_is_called_for_each_portion(hooked: Hooked) -> None:
    given: list[Tensor] = []

    def close(part: Tensor) -> Tensor:
        given.append(part)
        return torch.zeros_like(part)

    with hooked.tap(replace={SITE: close}):
        assert not hooked(X).any()
    assert [len(part) for part in given] == [2, 2, 1]
    assert torch.equal(given[1], 2 * X[2:4])  # computed from what was put in place before
    every = torch.full_like(X, 7)
    with hooked.tap(replace={SITE: lambda part: every}):
        assert torch.equal(hooked(X), every)
    with hooked.tap(replace={SECOND: torch.zeros_like}):
        assert hooked(X)[:2].any()
        assert not hooked(X)[2:4].any()


def test_gates_mix_what_comes(hooked: Hooked) -> None:
    baseline = Zero()
    baseline.start((2,))
    (site,) = hooked.sites
    masking = Masking(site, 0, [], HardConcrete(), baseline)
    usual = hooked(X)
    for sample, wanted in (
        (torch.ones(5), usual),
        (torch.tensor([0.0, 0, 1, 1, 1]), torch.cat([0 * X[:2], *(hooked(torch.cat([0 * X[:2], X[2:]]))[2:],)])),
    ):
        masked = masking.mask(usual, Places(torch.ones(5, dtype=torch.bool)), sample)
        with hooked.tap(replace={site: masking.replacement(masked)}):
            assert same_bits(hooked(X), wanted)


def test_gradients_come_back_to_what_was_read_and_put_in_place(hooked: Hooked) -> None:
    x = X.clone().requires_grad_()
    with hooked.tap(read=SECOND) as tap:
        (grad,) = torch.autograd.grad(hooked(x)[2:4].sum(), tap.values[SECOND])
        assert torch.equal(grad, torch.ones(2, 2))
    leaf = torch.ones(2, 2, requires_grad=True)
    with hooked.tap(replace={SECOND: lambda part: leaf}):
        hooked(X).sum().backward()
    assert leaf.grad is not None


def test_portions_that_do_not_go_below_each_other() -> None:
    class Uneven(Chunks):
        def forward(self, x: Tensor) -> Any:
            return [place(part) for place in self.through for part in (x, x[:, :1])]

    hooked = maskhooks.wrap(Uneven(), adapter=ChunksAdapter)
    message = r"shapes \[5, 2\] and \[5, 1\].*Address one call, such as 'part@0:output'"
    with pytest.raises(NotATensorError, match=message), hooked.tap(read=SITE):
        hooked(X)


def test_a_replacement_of_another_shape(hooked: Hooked) -> None:
    with pytest.raises(ReplacementError, match="replacement is"), hooked.tap(replace={SITE: lambda part: part[:1]}):
        hooked(X)


@pytest.mark.parametrize("again", [False, True])
def test_portions_computed_again_during_backward(again: bool) -> None:
    """Each has put in its place what it had in the pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chunks = Chunks()

        def forward(self, x: Tensor) -> Any:
            return (checkpoint(self.chunks, x, use_reentrant=False) if again else self.chunks(x)).square()

    hooked, x = maskhooks.wrap(Net(), adapter=ChunksAdapter), X.clone().requires_grad_()
    weight = torch.full((5, 2), 0.5, requires_grad=True)
    with hooked.tap(replace={"chunks.part:output": lambda part: part * weight[: len(part)]}):
        hooked(x).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert [round(float(grad.sum()), 3) for grad in (x.grad, weight.grad)] == [930, 11536]


@pytest.mark.parametrize("apart", [False, True])
def test_portions_made_for_reading_are_read_without_a_copy(apart: bool) -> None:
    place, portion = Parts(apart=apart), torch.ones(2, 3)
    values: dict[str, Tensor] = {}
    port = PartsPort(place, values, {})
    port.add(Point(Site("part"), None))
    handle = port.attach()
    place(portion)
    assert (values[str(Site("part"))] is portion) == apart
    other = place.register_forward_hook(lambda *_: None)  # whoever else is given it may change it
    port.calls = 0
    place(portion)
    assert values[str(Site("part"))] is not portion
    assert torch.equal(values[str(Site("part"))], portion)
    handle.remove()
    other.remove()


class Picking(nn.Module):
    """Sums rows of states, picked by numbers in portions; states of the same numbers come again, or others do."""

    def __init__(self, widths: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        self.through: list[nn.Module] = []
        self.states = [torch.ones(2, widths[0]), torch.ones(2, widths[1]), torch.arange(3.0 * widths[2]).view(3, -1)]
        self.numbers = [torch.tensor([1, 0, 1]), torch.tensor([0]), torch.tensor([2, 0])]

    def forward(self, x: Tensor) -> Tensor:
        for states, numbers in zip(self.states, self.numbers, strict=True):
            for place in self.through:
                place(states, numbers)
            x = x + states[numbers].sum()
        return x


class PickingAdapter(ChunksAdapter):
    def types(self) -> tuple[type[nn.Module], ...]:
        return (Picking,)

    def places(self, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"part": Parts(apart=True)}


@pytest.mark.parametrize("grad", [False, True])
def test_states_and_numbers_that_portions_are_picked_by(grad: bool) -> None:
    model = Picking()
    hooked = maskhooks.wrap(model, adapter=PickingAdapter)
    if grad:
        model.states = [part.requires_grad_() for part in model.states]
    with torch.set_grad_enabled(grad), hooked.tap(read=["part:input", "part:input[1]", "part:output"]) as tap:
        for _ in range(2):  # each pass begins anew
            hooked(torch.zeros(()))
            states, numbers, rows = (tap.values[site] for site in ("part:input", "part:input[1]", "part:output"))
            assert states.shape == (5, 3), "those of the second portion are those of the first"
            assert numbers.tolist() == [1, 0, 1, 0, 4, 2]
            assert torch.equal(states[numbers], rows)
            assert states.requires_grad is grad
    model.states[0].detach().zero_()
    assert states[:2].eq(1).all(), "what was read is a copy"


def test_states_and_numbers_of_one_portion() -> None:
    hooked = maskhooks.wrap(Picking(), adapter=PickingAdapter)
    with hooked.tap(read=["part@2:input", "part@2:input[1]", "part@2:output"]) as tap:
        hooked(torch.zeros(()))
    states, numbers, rows = tap.values.values()
    assert torch.equal(states, hooked.model.states[2])
    assert numbers.tolist() == [2, 0]
    assert torch.equal(rows, states[numbers])


def test_rows_that_nobody_reads_are_not_picked() -> None:
    place, values = Parts(apart=True), dict[str, Tensor]()
    port = PicksPort(place, values, {})
    port.add(Point(Site("part", "input"), None))
    with port.attach():
        states = torch.ones(2, 3)
        assert place(states, torch.tensor([1])) is states
    assert torch.equal(values["part:input"], states)


@pytest.mark.parametrize("port", ["input", "input[1]", "output"])
def test_what_is_made_to_be_read_is_not_replaced(port: str) -> None:
    hooked = maskhooks.wrap(Picking(), adapter=PickingAdapter)
    with (
        pytest.raises(ReplacementError, match="can only be read"),
        hooked.tap(replace={f"part:{port}": torch.zeros_like}),
    ):
        raise AssertionError
    assert not places(hooked.model)["part"]._forward_hooks
    assert not places(hooked.model)["part"]._forward_pre_hooks


def test_states_of_several_widths_are_refused() -> None:
    hooked = maskhooks.wrap(Picking((3, 3, 2)), adapter=PickingAdapter)
    with pytest.raises(NotATensorError, match="part@0:input"), hooked.tap(read="part:input"):
        hooked(torch.zeros(()))
