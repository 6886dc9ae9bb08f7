"""Tap: what is read and replaced where, and the errors of the hook layer, each with a way out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskhooks.errors import (
    CompiledModelError,
    ModelError,
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
from tests.conftest import same_bits
from tests.models import MLP, Broken, Cell, KeywordOnly, Nested, Stack, Tiny


def site(address: str, **settings: Any) -> Site:
    return Site.parse(address, **settings)


def test_reads_every_kind_of_place(model: Tiny) -> None:
    addresses = model.read()
    with Tap(model, read=[site(address) for address in addresses]) as tap:
        outputs = model.run()
    assert sorted(tap.values) == sorted(addresses)
    assert tap.outputs is outputs
    assert all(value.numel() for value in tap.values.values())


def test_values_are_what_the_module_saw() -> None:
    model, x = MLP().eval(), torch.randn(3, 4)
    with Tap(model, read=[site("first:output"), site("act:input"), site("last:input.input"), site(":input")]) as tap:
        model(x)
    hidden = model.first(x)
    assert same_bits(tap.values["first:output"], hidden)
    assert same_bits(tap.values["act:input"], hidden)
    assert same_bits(tap.values["last:input.input"], hidden.relu())
    assert same_bits(tap.values[":input"], x)


def test_weights_without_a_shape_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    with pytest.raises(ModelError, match=r"2 of the model's weights, such as '1\.weight', .* Run the model once"):
        Tap(model, read=[site("0:output")]).__enter__()
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert not model._forward_hooks
    model(torch.randn(3, 4))
    with Tap(model, read=[site("1:output")]) as tap:
        model(torch.randn(3, 4))
    assert tap.values["1:output"].shape == (3, 2)


@pytest.mark.parametrize("grad", [False, True])
def test_later_changes_in_place_do_not_reach_a_value(grad: bool) -> None:
    model = Stack().eval()
    with torch.set_grad_enabled(grad), Tap(model, read=[site("layers.0:output"), site("act@0:input")]) as tap:
        model.run()
    assert (tap.values["layers.0:output"] < 0).any()
    assert (tap.values["act@0:input"] < 0).any()


def test_later_changes_in_place_do_not_reach_a_value_on_the_gradients_path() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
    x = torch.randn(3, 4, requires_grad=True)
    with Tap(model, read=[site("0:output")]) as tap:
        model(x)
    assert tap.values["0:output"].requires_grad
    assert (tap.values["0:output"] < 0).any()


def test_values_lie_on_the_gradients_path() -> None:
    model, x = MLP(), torch.randn(3, 4, requires_grad=True)
    with Tap(model, read=[site("first:output"), site(":input")]) as tap:
        model(x).sum().backward(inputs=[tap.values["first:output"], x])
    assert tap.values["first:output"].grad is not None
    assert tap.values[":input"] is x


def test_reading_leaves_the_outputs_equal_bit_for_bit(model: Tiny) -> None:
    batch = model.example()
    model.eval()
    usual = model.run()
    with Tap(model, read=[site(address) for address in model.read()]) as tap:
        model.run()
    del batch
    same = usual if isinstance(usual, Tensor) else usual.logits
    tapped = tap.outputs if isinstance(tap.outputs, Tensor) else tap.outputs.logits
    assert same_bits(same, tapped)


@pytest.mark.parametrize(
    ("address", "name"),
    [("first:output", "first"), ("act:input", "first"), ("act:output", "act"), ("last:input[0]", "act")],
)
def test_replacing_changes_what_comes_after(address: str, name: str) -> None:
    model, x = MLP().eval(), torch.randn(3, 4)
    with Tap(model, replace={site(address): torch.zeros_like}) as tap:
        outputs = model(x)
    hidden = torch.zeros(3, 5)
    assert same_bits(outputs, model.last(hidden))
    assert tap.outputs is outputs


def test_read_and_replaced_gives_the_value_before() -> None:
    model, x = MLP().eval(), torch.randn(3, 4)

    def in_place(value: Tensor) -> Tensor:
        return value.zero_()

    for function in (torch.zeros_like, in_place):
        for context in (torch.no_grad(), torch.enable_grad()):
            with (
                context,
                Tap(model, read=[site("first:output")], replace={site("first:output"): function}) as tap,
            ):
                outputs = model(x)
            assert same_bits(tap.values["first:output"], model.first(x))
            assert same_bits(outputs, model.last(torch.zeros(3, 5)))


def test_one_part_of_nested_outputs_is_replaced() -> None:
    model, x = Nested().eval(), torch.randn(3, 4)
    with Tap(model, replace={site("parts:output[1].double"): torch.zeros_like}) as tap:
        result = model(x)
    value = model.parts.linear(x)
    assert same_bits(result.logits, model.head(value))
    assert same_bits(result.hidden["triple"], 3 * value)
    assert not result.hidden["double"].any()
    assert tap.outputs is result


def test_the_whole_models_output_is_replaced() -> None:
    model = Nested()
    with Tap(model, replace={site(":output.logits"): torch.zeros_like}) as tap:
        result = model.run()
    assert not result.logits.any()
    assert tap.outputs is result


def test_calls_are_addressed_one_by_one_or_all() -> None:
    model, x = Cell().eval(), torch.randn(2, 3, 4)
    with Tap(model, read=[site("cell@*:output"), site("cell@1:output"), site("cell@2:input.hx")]) as tap:
        model(x)
    assert list(tap.values) == ["cell@0:output", "cell@1:output", "cell@2:output", "cell@2:input.hx"] or set(
        tap.values
    ) == {"cell@0:output", "cell@1:output", "cell@2:output", "cell@2:input.hx"}
    assert same_bits(tap.values["cell@1:output"], tap.values["cell@2:input.hx"])
    with Tap(model, replace={site("cell@2:output"): torch.zeros_like}):
        assert same_bits(model(x), model.head(torch.zeros(2, 4)))
    seen: list[int] = []
    with Tap(model, replace={site("cell@*:output"): lambda value: (seen.append(len(seen)), value)[1]}):
        model(x)
    assert seen == [0, 1, 2]


def test_an_argument_is_found_by_position_and_by_name_however_it_was_passed() -> None:
    for address in ["block:input", "block:input[0]", "block:input.states"]:
        model = KeywordOnly().eval()
        with Tap(model, read=[site(address)], replace={site(address): torch.zeros_like}) as tap:
            outputs = model.run()
        assert tap.values[address].shape == (2, 4)
        assert same_bits(outputs[0], outputs[1])
    by_position = MLP()
    for address in ["last:input", "last:input[0]", "last:input.input"]:
        with Tap(by_position, replace={site(address): torch.zeros_like}):
            assert same_bits(*by_position.run()[:2])


def test_values_belong_to_the_latest_pass() -> None:
    model = MLP()
    with Tap(model, read=[site("first:output")]) as tap:
        for rows in (1, 2, 3):
            model(torch.randn(rows, 4))
            assert tap.values["first:output"].shape == (rows, 5)


def test_a_part_of_the_model_may_be_run_alone() -> None:
    model, x = MLP(), torch.randn(3, 4)
    with Tap(model, read=[site("first:output")]) as tap:
        model.first(x)
    assert "first:output" in tap.values


def test_a_pass_that_raised_does_not_disturb_the_next() -> None:
    model = MLP()
    with Tap(model, read=[site("first:output"), site("last:output")]) as tap:
        model.broken = True
        for _ in range(2):
            with pytest.raises(Broken):
                model.run()
        model.broken = False
        model.run()
        assert len(tap.values) == 2
        try:
            raise ValueError
        except ValueError:
            model.run()  # the caller handles an error of its own
            assert tap.outputs is not None
            with pytest.raises(SiteConflictError):
                tap.__enter__()


def test_a_model_may_return_nothing() -> None:
    class Silent(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)

        def body(self, x: Tensor) -> None:
            return None

    with pytest.raises(SiteNeverFiredError), Tap(Silent(), read=[site("unused:output")]) as tap:
        tap.model.run()


def test_a_tap_can_be_entered_again() -> None:
    model = MLP()
    tap = Tap(model, read=[site("first:output")])
    for _ in range(2):
        with tap:
            model.run()
        assert "first:output" in tap.values


def test_values_take_a_site_and_list_near_keys() -> None:
    model = MLP()
    with Tap(model, read=[site("first:output")]) as tap:
        model.run()
    assert tap.values[site("first:output")] is tap.values["first:output"]
    assert site("first:output") in tap.values
    with pytest.raises(UnknownSiteError, match="Did you mean 'first:output'"):
        tap.values["frist:output"]


def test_under_inference_mode() -> None:
    model = MLP()
    with torch.inference_mode(), Tap(model, read=[site("first:output")]) as tap:
        model.run()
    assert tap.values["first:output"].shape == (3, 5)


def test_shared_module_under_two_names() -> None:
    class Shared(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def body(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Shared(), torch.randn(2, 4)
    with Tap(model, read=[site("a@0:output"), site("b@1:output")]) as tap:
        model(x)
    assert same_bits(tap.values["b@1:output"], model(x))


# Errors: each names the thing and a way out


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


def test_two_replacements_of_different_values() -> None:
    model = Cell()
    sites = [
        site("cell@0:output"),
        site("cell@1:output"),
        site("cell@1:input.hx"),
        site("cell@1:input.input"),
    ]
    with Tap(model, replace=dict.fromkeys(sites, torch.neg)):
        model.run()


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


# Nesting


def test_the_inner_tap_sees_the_outer_ones_value() -> None:
    model, x = MLP().eval(), torch.randn(3, 4)
    with (
        Tap(model, replace={site("first:output"): torch.ones_like}),
        Tap(model, read=[site("first:output")], replace={site("first:output"): lambda v: 2 * v}) as inner,
    ):
        outputs = model(x)
    assert inner.values["first:output"].eq(1).all()
    assert same_bits(outputs, model.last(torch.full((3, 5), 2.0)))


def test_a_tap_on_a_part_of_a_tapped_model() -> None:
    model = Nested()
    with (
        Tap(model, read=[site("parts:output[0]")]) as outer,
        Tap(model.parts, read=[site("linear:output")]) as inner,
    ):
        model.run()
        assert same_bits(outer.values["parts:output[0]"], inner.values["linear:output"])


def test_a_model_that_calls_itself() -> None:
    class Twice(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            y = self.linear(x)
            return self(y, again=False) if again else y

    model = Twice()
    with Tap(model, read=[site("linear@*:output")]) as tap:
        model.run()
    assert list(tap.values) == ["linear@0:output", "linear@1:output"]


# Parts that the caller runs alone, as `generate` does with an encoder


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        decoded: Tensor = self.decoder(self.encoder(x) if encoded is None else encoded)
        return decoded


def test_a_part_that_ran_alone_need_not_fire_in_the_passes_after_it() -> None:
    model, x = Halves(), torch.randn(3, 4)
    sites = [site("encoder:output"), site("decoder:output")]
    with Tap(model, read=sites, replace={sites[0]: torch.zeros_like}) as tap:
        encoded = model.encoder(x)
        for _ in range(2):
            given = model(x, encoded)
        assert torch.equal(tap.values["encoder:output"], nn.functional.linear(x, *model.encoder.parameters()))
        assert torch.equal(tap.values["decoder:output"], given)
        whole = model(x + 1)  # the encoder's value is that of the latest pass again
        assert torch.equal(tap.values["encoder:output"], nn.functional.linear(x + 1, *model.encoder.parameters()))
        model.encoder(x)  # a second time alone
        assert torch.equal(model(x, encoded), given)
        assert torch.equal(tap.values["encoder:output"], nn.functional.linear(x, *model.encoder.parameters()))
    assert not encoded.any()
    assert torch.equal(whole, given)


def test_a_part_that_never_ran_alone_must_fire_in_each_pass() -> None:
    model, x = Halves(), torch.randn(3, 4)
    with Tap(model, read=[site("encoder:output")]):
        model(x)
        with pytest.raises(SiteNeverFiredError, match="encoder:output"):
            model(x, x)
    tap = Tap(model, read=[site("encoder:output")])
    with tap:
        model.encoder(x)
        model(x, x)
    with pytest.raises(SiteNeverFiredError, match="encoder:output"), tap:
        model(x, x)  # a tap opened anew has seen nothing


def test_a_part_that_ran_alone_must_fire_once_a_whole_pass_has_overwritten_its_value() -> None:
    model, x = Halves(), torch.randn(3, 4)
    with Tap(model, read=[site("encoder:output")]) as tap:
        encoded = model.encoder(x)
        model(x, encoded)
        model(x + 1)
        with pytest.raises(SiteNeverFiredError, match="encoder:output"):
            model(x, encoded)
        assert not tap.values
