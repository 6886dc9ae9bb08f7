"""Tap: what is read and replaced where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskhooks.errors import ModelError, SiteNeverFiredError, UnknownSiteError
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.conftest import same_bits
from tests.models import MLP, Cell, KeywordOnly, Nested, Stack, Tiny

site = Site.parse


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


def test_a_model_may_return_nothing() -> None:
    class Silent(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)

        def body(self, x: Tensor) -> None:
            return None

    with pytest.raises(SiteNeverFiredError), Tap(Silent(), read=[site("unused:output")]) as tap:
        tap.model.run()


def test_values_take_a_site_and_list_near_keys() -> None:
    model = MLP()
    with Tap(model, read=[site("first:output")]) as tap:
        model.run()
    assert tap.values[site("first:output")] is tap.values["first:output"]
    assert tap.values.get(site("first:output")) is tap.values["first:output"]
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


def test_two_replacements_of_different_values() -> None:
    model, x = Cell().eval(), torch.randn(2, 3, 4)
    addresses = ["cell@0:output", "cell@1:output", "cell@1:input.hx", "cell@1:input.input"]
    with Tap(model, replace={site(address): torch.neg for address in addresses}):
        outputs = model(x)
    first = -model.cell(x[:, 0], torch.zeros(2, 4))
    second = -model.cell(-x[:, 1], -first)
    assert same_bits(outputs, model.head(model.cell(x[:, 2], second)))
