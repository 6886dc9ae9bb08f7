"""Errors of a tap: each names the site or module and a way out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.errors import (
    CompiledModelError,
    NotATensorError,
    ReplacementError,
    SiteConflictError,
    SiteFiredTooOftenError,
    SiteNeverFiredError,
    UnfiredSiteWarning,
    UnknownSiteError,
)
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.models import MLP, Broken, Cell, KeywordOnly, Nested, Tiny

site = Site.parse


def raises(error: type[Exception], model: Tiny, *words: str, read: Any = (), replace: Any = None) -> Exception:
    with pytest.raises(error) as raised, Tap(model, read=read, replace=replace):
        model.run()
    for word in words:
        assert word in str(raised.value), str(raised.value)
    return raised.value


def test_unknown_module() -> None:
    error = raises(UnknownSiteError, MLP(), "frist", "Did you mean 'first'", read=[site("frist:output")])
    assert isinstance(error, UnknownSiteError)
    assert error.near[0] == "first"
    assert error.site == site("frist:output")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("first:output", "first:output"),
        ("parts:output[1]", "parts:output[1].double"),
        ("cell@1:output", "cell@*:output"),
        ("block:input.states", "block:input"),
        ("block:input.states", "block:input[0]"),
    ],
)
def test_two_replacements_of_one_value(one: str, other: str) -> None:
    name = one.partition(":")[0].partition("@")[0]
    model = {"first": MLP, "parts": Nested, "cell": Cell, "block": KeywordOnly}[name]()
    sites = {site(one): torch.neg, site(other, tags=frozenset({"x"})): torch.neg}
    error = raises(SiteConflictError, model, one, other, "nest two taps", replace=sites)
    assert isinstance(error, SiteConflictError)


def test_never_fired() -> None:
    model = Cell()
    words = ("cell@3:output", "ran 3 time(s), its last call is @2", "maskhooks doctor", "optional=True")
    raises(SiteNeverFiredError, model, *words, read=[site("cell@3:output")])
    with pytest.raises(SiteNeverFiredError, match="did not run"), Tap(model, read=[site("head:output")]):
        pass


def test_forward_called_around_the_hooks() -> None:
    class Around(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def body(self, x: Tensor) -> Tensor:
            return self.inner.forward(x)

    raises(SiteNeverFiredError, Around(), "inner:output", "module.forward(...)", read=[site("inner:output")])


def test_fired_too_often() -> None:
    words = ("cell:output", "'cell@0:output' (from 0)", "'cell@*:output'")
    raises(SiteFiredTooOftenError, Cell(), *words, read=[site("cell:output")])
    words = ("'cell@*:input.hx'",)
    raises(SiteFiredTooOftenError, Cell(), *words, replace={site("cell:input.hx"): torch.neg})


def test_not_a_tensor() -> None:
    raises(
        NotATensorError,
        Nested(),
        "'parts:output[0]'",
        "'parts:output[1].double'",
        read=[site("parts:output")],
    )
    raises(NotATensorError, Nested(), "the value is None", "another part", read=[site("parts:output[2]")])
    raises(NotATensorError, Nested(), "no [5] in a tuple", read=[site("parts:output[5]")])
    words = ("no argument .nothing", "which has .states, .scale")
    raises(NotATensorError, KeywordOnly(), *words, read=[site("block:input.nothing")])
    raises(NotATensorError, KeywordOnly(), "the value is a float", replace={site("block:input.scale"): torch.neg})


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda value: value[:, :1], "[3, 1] torch.float32 cpu"),
        (lambda value: value.double(), "[3, 5] torch.float64 cpu"),
        (lambda value: None, "None"),
        (lambda value: value.to("meta"), "meta"),
    ],
)
def test_bad_replacement(function: Any, got: str) -> None:
    words = ("first:output", got, "the value is [3, 5] torch.float32 cpu", "new.to(value)")
    raises(ReplacementError, MLP(), *words, replace={site("first:output"): function})


def test_replacement_inside_a_read_only_container() -> None:
    import types

    class Proxy(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def body(self, x: Tensor) -> Tensor:
            return self.inner(x)["x"]

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return types.MappingProxyType({"x": 2 * x})

    model = Proxy()
    raises(ReplacementError, model, "read-only", "torch.no_grad()", replace={site("inner:output.x"): torch.neg})
    with torch.no_grad(), Tap(model, read=[site("inner:output.x")]) as tap:
        model.run()
    assert "inner:output.x" in tap.values


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "script", "parent"])
def test_compiled(how: str) -> None:
    model = MLP()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if how == "module.compile":
            model.first.compile(backend="eager")
        elif how == "parent":
            model.compile(backend="eager")
        elif how == "script":
            model.first = torch.jit.script(model.first)
        else:
            model.first = torch.compile(model.first, backend="eager")  # type: ignore[assignment]
    name = "the model" if how == "parent" else "module 'first'"
    error = raises(CompiledModelError, model, name, "before compiling it", read=[site("first:output")])
    assert isinstance(error, CompiledModelError)
    assert error.module == ("" if how == "parent" else "first")
    way = "module._compiled_call_impl = None" if how in ("parent", "module.compile") else "compiled._orig_mod"
    assert way in str(error)
    if how != "parent":
        with Tap(model, read=[site("last:output")]):
            model.run()


def test_optional_sites() -> None:
    class Expert(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def body(self, x: Tensor) -> Tensor:
            return self.experts[1](x)

    model = Expert()
    sites = [site(f"experts.{i}:output", optional=True) for i in range(3)]
    with (
        pytest.warns(UnfiredSiteWarning, match="2 optional sites never fired: experts.0:output, experts.2:output"),
        Tap(model, read=sites) as tap,
    ):
        model.run()
    assert list(tap.values) == ["experts.1:output"]
    assert tap.skipped == {"experts.0:output": "never fired", "experts.2:output": "never fired"}
    raises(SiteNeverFiredError, model, "none of the 1 optional sites", "maskhooks doctor", read=sites[:1])


def test_optional_sites_without_a_tensor() -> None:
    sites = [site("parts:output[0]", optional=True), site("parts:output[2]", optional=True)]
    model = Nested()
    with Tap(model, read=sites) as tap:
        model.run()
    assert list(tap.values) == ["parts:output[0]"]
    assert tap.skipped == {"parts:output[2]": "the value is None"}
    raises(SiteNeverFiredError, model, "the value is None", read=sites[1:])


def test_the_users_error_is_not_hidden_behind_ours() -> None:
    """Where a replacement raises, sites further on have not fired; that is no second error or warning."""
    model = Nested()

    def fails(value: Tensor) -> Tensor:
        raise Broken("in the replacement")

    replace = {site(":output.logits"): fails, site(":output.hidden.double"): torch.neg}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Broken, match="in the replacement"), Tap(model, replace=replace):
            model.run()


def test_messages_have_no_doubled_words_and_end_with_a_sentence() -> None:
    model = Cell()
    messages = []
    for address in ["cell:output", "cell@9:output", "head:output[0]", "hed:output"]:
        with pytest.raises(Exception) as raised, Tap(model, read=[site(address)]):
            model.run()
        messages.append(str(raised.value))
    for message in messages:
        assert message.endswith((".", "?"))
        assert not re.search(r"\b(\w+) \1\b", message)
