"""A hundred odd modules: open gates change no bit, closed ones let no gradient through, nothing is left or skipped.

The modules are generated: what the part returns, how it is called and how often, what is changed in place, what hooks
others have on it. Each is looked at from each of its places.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from maskhooks.errors import SiteFiredTooOftenError, SiteNeverFiredError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.hooks.tap import Tap
from maskhooks.masks.mix import mix
from maskhooks.sites import nested
from maskhooks.sites.site import Site
from tests.conftest import fingerprint, same_bits
from tests.models import Broken


@dataclass
class Box:
    inner: Tensor
    rest: Any = None


@dataclass(frozen=True)
class Sealed:
    inner: Tensor


@dataclass
class Late:
    """A field that its constructor does not take."""

    inner: Tensor
    size: int = field(init=False, default=0)


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Attributes(dict[str, Any]):
    """A mapping read by attribute too, as of transformers."""

    __getattr__ = dict.__getitem__


# What the part returns: how it packs a value, where the value stands then, and how the model gets it out.
RETURNS: dict[str, tuple[Callable[[Tensor], Any], str, Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, "", lambda out: out),
    "tuple": (lambda x: (x, None), "[0]", lambda out: out[0]),
    "last of a tuple": (lambda x: (None, 3, x), "[-1]", lambda out: out[-1]),
    "list": (lambda x: [None, x], "[1]", lambda out: out[1]),
    "dictionary": (lambda x: {"size": 2, "x": x, "none": None}, ".x", lambda out: out["x"]),
    "mapping by attribute": (lambda x: Attributes(x=x, past=None), ".x", lambda out: out.x),
    "dataclass": (lambda x: Box(x, rest=[None]), ".inner", lambda out: out.inner),
    "frozen dataclass": (lambda x: Sealed(x), ".inner", lambda out: out.inner),
    "late field": (lambda x: Late(x), ".inner", lambda out: out.inner),
    "named tuple": (lambda x: Pair(x, None), ".first", lambda out: out.first),
    "deep": (lambda x: ({"a": [Box(x, None), None]}, "text"), "[0].a[0].inner", lambda out: out[0]["a"][0].inner),
    "beside others": (lambda x: (x, x.detach() + 1, {"more": torch.zeros(1)}), "[0]", lambda out: out[0]),
    "any object": (lambda x: SimpleNamespace(x=x), ".x", lambda out: out.x),
    "packed": (lambda x: PackedSequence(x, torch.tensor([len(x)])), ".data", lambda out: out.data),
    "torch's own tuple": (lambda x: torch.max(x[None], 0), ".values", lambda out: out.values),
}

# How the part is called, and where its argument stands then.
CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Any], list[str]]] = {
    "by position": (lambda part, x: part(x), ["", "[0]", ".x"]),
    "by keyword": (lambda part, x: part(x=x), ["", "[0]", ".x"]),
    "with others": (lambda part, x: part(x, None, scale=1.0, rest=(None, [x])), ["", ".x"]),
    "others first": (lambda part, x: part(rest={"x": None}, x=x), [".x"]),
}

# What happens to the value after the part, in the model.
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "in place": lambda x: x.tanh_(),
    "module in place": nn.LeakyReLU(0.3, inplace=True),
    "view": lambda x: x.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4),
    "view in place": lambda x: x.view(-1).mul_(2).view(-1, 4),
    "written to": lambda x: x.index_fill_(1, torch.tensor([1]), 0.5),
    "cast": lambda x: x.double().float(),
}


class Part(nn.Module):
    def __init__(self, returns: str, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.returns = returns

    def forward(self, x: Tensor, mask: Any = None, *, scale: float = 1.0, rest: Any = None) -> Any:
        return RETURNS[self.returns][0](scale * self.inner(x))


class Odd(nn.Module):
    """A part called `calls` times in one of many ways; with `alias`, under two names in turn."""

    def __init__(
        self, returns: str = "tensor", call: str = "by position", after: str = "nothing", calls: int = 1, **kind: bool
    ) -> None:
        super().__init__()
        generator = Generator().manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.part = Part(returns, nn.Linear(4, 4))
        if kind.get("alias"):
            self.alias = self.part
        if kind.get("tied"):
            self.part.inner.weight = self.first.weight
        self.last = nn.Linear(4, 3)
        for weight in self.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
        self.returns, self.call, self.after, self.calls, self.kind = returns, call, after, calls, kind

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for number in range(self.calls):
            part = self.alias if self.kind.get("alias") and number % 2 else self.part
            if number == self.calls - 1 and self.kind.get("left"):
                continue  # the last round goes without the part
            x = AFTER[self.after](RETURNS[self.returns][2](CALLS[self.call][0](part, x)))
        logits = self.last(x)
        return {"logits": logits, "none": None} if self.kind.get("named") else logits


def logits(model: nn.Module, x: Tensor) -> Tensor:
    outputs = model(x)
    found: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    return found


def gate(z: float, baseline: float = 0.5) -> Callable[[Tensor], Tensor]:
    return lambda value: mix(value, torch.full((len(value), 1), z), torch.full(value.shape[1:], baseline))


def independent(model: nn.Module, module: nn.Module, x: Tensor) -> list[Tensor]:
    """What a plain hook sees a part give, call by call."""
    seen: list[Tensor] = []
    get = RETURNS[model.returns][2]  # type: ignore[index, union-attr]
    handle = module.register_forward_hook(lambda _, args, out: seen.append(get(out).clone()))
    model(x)
    handle.remove()
    return seen


def places(model: Odd) -> Iterator[str]:
    """Addresses of each call, before and after the part."""
    for number in range(model.calls - bool(model.kind.get("left"))):
        at = f"@{number}" if model.calls > 1 else ""
        yield f"part{at}:output{RETURNS[model.returns][1]}"
        for path in CALLS[model.call][1]:
            yield f"part{at}:input{path}"


def doctor(model: Odd) -> Counter[str]:
    """All that must hold for one odd module; counts what was looked at."""
    looked: Counter[str] = Counter()
    x, other = torch.randn(5, 4), torch.randn(5, 4)
    before = fingerprint(model)
    with frozen(model), torch.no_grad():
        usual, unlike = logits(model, x), logits(model, other)
        seen = independent(model, model.part, x)
    assert not same_bits(usual, unlike)
    path = RETURNS[model.returns][1]
    with torch.no_grad(), Tap(model, [Site.parse(f"part@*:output{path}")]) as tap:
        assert same_bits(logits(model, x), usual)
    assert [key.partition(":")[0] for key in tap.values] == [f"part@{n}" for n in range(len(seen))]
    assert all(same_bits(value, plain) for value, plain in zip(tap.values.values(), seen, strict=True))
    with pytest.raises(SiteNeverFiredError), Tap(model, [Site.parse(f"part@{len(seen)}:output{path}")]):
        logits(model, x)
    if len(seen) > 1:
        with pytest.raises(SiteFiredTooOftenError), Tap(model, [Site.parse(f"part:output{path}")]):
            logits(model, x)
    for address in places(model):
        site = Site.parse(address)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), Tap(model, [site], {site: gate(1.0, float("nan"))}):
                assert same_bits(logits(model, x), usual), address
        assert gradient(model, site, x, 0.0).count_nonzero() == 0, address
        assert gradient(model, site, x, 1.0).count_nonzero() > 0, address
        with torch.no_grad(), Tap(model, replace={site: gate(0.0)}):
            assert same_bits(logits(model, x), logits(model, other)), address
        replayed(model, site, x)
        looked[site.port] += 1
    raising(model, x, before)
    after = fingerprint(model)
    before.pop("rng"), after.pop("rng")
    assert after == before
    return looked


def gradient(model: Odd, site: Site, x: Tensor, z: float) -> Tensor:
    """The gradient to a gated value."""
    leaves: list[Tensor] = []

    def replace(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return gate(z)(leaves[-1])

    with Tap(model, replace={site: replace}):
        logits(model, x).square().sum().backward()
    (leaf,) = leaves
    assert leaf.grad is not None
    return leaf.grad


def replayed(model: Odd, site: Site, x: Tensor) -> None:
    """A masked pass from the site onward is the full one's."""
    replay = Replay(model)
    replay.trace(lambda: model(x))
    with frozen(model), torch.no_grad():
        with replay.record([site]) as recording:
            logits(model, x)
        with Tap(model, replace={site: gate(0.3)}):
            full = logits(model, x)
            with recording.play(site):
                assert same_bits(logits(model, x), full), str(site)


def raising(model: Odd, x: Tensor, before: dict[str, Any]) -> None:
    """An exception before and after each module, on its first call and on its last."""
    for module in model.modules():
        for register in (module.register_forward_pre_hook, module.register_forward_hook):

            def raises(*_: Any) -> None:
                raise Broken

            address = next(iter(places(model)))
            tap = Tap(model, [Site.parse(address)], {Site.parse(address): torch.neg})
            handle: Any = register(raises)  # type: ignore[operator] # either of two
            with pytest.raises(Broken), tap:
                model(x)
            handle.remove()
            after = fingerprint(model)
            assert {k: v for k, v in after.items() if k != "rng"} == {k: v for k, v in before.items() if k != "rng"}


PLAIN = [(returns, call) for returns in RETURNS for call in CALLS]


@pytest.mark.parametrize(("returns", "call"), PLAIN)
def test_what_it_returns_and_how_it_is_called(returns: str, call: str) -> None:
    looked = doctor(Odd(returns, call))
    assert looked == {"output": 1, "input": len(CALLS[call][1])}


@pytest.mark.parametrize(("after", "calls"), list(itertools.product(AFTER, (1, 3))))
def test_what_happens_after_it(after: str, calls: int) -> None:
    assert doctor(Odd("tuple", "by keyword", after, calls))["output"] == calls


@pytest.mark.parametrize("calls", [2, 3])
@pytest.mark.parametrize("kind", ["alias", "tied", "left", "named"])
def test_kinds(kind: str, calls: int) -> None:
    model = Odd("dictionary", calls=calls, **{kind: True})
    assert doctor(model)["output"] == calls - (kind == "left")
    if kind == "alias":
        x = torch.randn(5, 4)
        with Tap(model, [Site.parse("alias@1:output.x"), Site.parse("part@1:output.x")]) as tap:
            model(x)
        assert same_bits(*tap.values.values())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    returns=st.sampled_from(sorted(RETURNS)),
    call=st.sampled_from(sorted(CALLS)),
    after=st.sampled_from(sorted(AFTER)),
    calls=st.integers(1, 3),
    kind=st.fixed_dictionaries({name: st.booleans() for name in ("alias", "tied", "named")}),
)
def test_any_of_these(returns: str, call: str, after: str, calls: int, kind: dict[str, bool]) -> None:
    looked = doctor(Odd(returns, call, after, calls, **kind))
    assert looked["output"] == calls


@pytest.mark.parametrize("returns", ["tensor", "tuple", "dataclass"])
def test_hooks_of_others_that_edit(returns: str) -> None:
    """Ours see what theirs made of the value, replay applies theirs once, and theirs stay."""
    model = Odd(returns, calls=2)
    pack, _, get = RETURNS[returns]
    model.part.register_forward_hook(lambda module, args, out: pack(get(out) + 1))
    model.part.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, out: out / 2)
    assert doctor(model)["output"] == 2


def test_repeated_steps_do_not_shift_the_numbers() -> None:
    """As `generate` runs a model: a longer input each time, in one tap; values are those of the latest step."""
    model, x = Odd("tuple", calls=3), torch.randn(1, 4)
    seen: list[int] = []
    replace = {Site.parse("part@1:output[0]"): lambda value: (seen.append(len(value)), value)[1]}
    with torch.no_grad(), Tap(model, [Site.parse("part@2:output[0]")], replace) as tap:
        for step in range(1, 5):
            x = torch.cat([x, torch.nn.functional.pad(logits(model, x)[-1:], (0, 1))])
            assert tap.values["part@2:output[0]"].shape == (step, 4)
    assert seen == [1, 2, 3, 4]


class Recurrent(nn.Module):
    """Padded sequences through an LSTM, packed or not."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(4, 4), nn.LSTM(4, 4, 2, batch_first=True), nn.Linear(4, 2)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        states = self.embed(x)
        if self.packed:
            states = pack_padded_sequence(states, torch.tensor([5, 2, 3]), True, enforce_sorted=False)
        states, _ = self.rnn(states)
        if self.packed:
            states, _ = pad_packed_sequence(states, batch_first=True)
        result: Tensor = self.head(states.sum(1))
        return result


PACKED = ["rnn:output[0].data", "rnn:input[0].data", "rnn:input.input.data", "rnn:output[0][0]", "embed:output"]
PADDED = ["rnn:output[0]", "rnn:input", "embed:output"]


@pytest.mark.parametrize(("packed", "address"), [(True, a) for a in PACKED] + [(False, a) for a in PADDED])
def test_packed_sequences(packed: bool, address: str) -> None:
    model, site, x, other = Recurrent(packed), Site.parse(address), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    before = fingerprint(model)

    def gated(z: float) -> Callable[[Tensor], Tensor]:
        return lambda value: mix(value, torch.full((*value.shape[:-1], 1), z), torch.zeros(value.shape[-1]))

    with torch.no_grad():
        usual = model(x)
        with Tap(model, [site], {site: gated(1.0)}) as tap:
            assert same_bits(model(x), usual)
        assert tap.values[address].shape == ((10, 4) if packed and "rnn" in address else (3, 5, 4))
        with Tap(model, replace={site: gated(0.0)}):
            assert same_bits(model(x), model(other))
    before.pop("rng")
    after = fingerprint(model)
    after.pop("rng")
    assert after == before


def test_every_container_is_walked() -> None:
    """Each kind of output above is described with its tensor, so that an error can name the place."""
    for returns, (pack, path, _) in RETURNS.items():
        if returns != "any object":  # a plain object is addressed, not searched
            value = pack(torch.zeros(2, 2))
            wanted = nested.get(value, Site.parse(f"part:output{path}").path)
            assert any(tensor is wanted for _, tensor in nested.tensors(value)), returns
