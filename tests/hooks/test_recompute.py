"""Recompute: activation checkpointing under a tap gives the true gradient and the true calls, or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskhooks.errors import GradientError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.recompute import recomputing
from maskhooks.hooks.tap import Tap
from maskhooks.masks.mix import mix
from maskhooks.sites.site import Site
from tests.conftest import same_bits

X = torch.randn(4, 4, generator=Generator().manual_seed(3))  # square: PyTorch's own check of shapes would not notice


class Segment(nn.Module):
    """Two square layers, of which the second is called twice; computed again in backward unless `how` is None."""

    def __init__(self, how: str | None) -> None:
        super().__init__()
        generator = Generator().manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        for weight in self.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
        self.how = how

    def segment(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.b(torch.tanh(self.a(x))))))

    def forward(self, x: Tensor) -> Tensor:
        if self.how is None:
            return self.segment(x)
        result: Tensor = checkpoint(self.segment, x, use_reentrant=self.how == "reentrant")
        return result


def half(sample: Tensor) -> Any:
    return lambda value: mix(value, sample, torch.zeros(4))


@pytest.mark.parametrize("address", ["a:output", "b@0:output", "b@1:output", "b@*:output", "b@1:input"])
def test_gates_inside_get_the_gradient_of_the_model_without_checkpointing(address: str) -> None:
    grads = []
    for how in (None, "not reentrant"):
        sample, x = torch.full((4, 1), 0.5, requires_grad=True), X.clone().requires_grad_()
        model = Segment(how)
        with Tap(model, read=[Site.parse("b@*:output")], replace={Site.parse(address): half(sample)}) as tap:
            model(x).sum().backward()
            assert list(tap.values) == ["b@0:output", "b@1:output"]
        assert sample.grad is not None
        assert x.grad is not None
        assert sample.grad.abs().sum() > 0
        grads.append((sample.grad, x.grad))
    assert same_bits(grads[0][0], grads[1][0])
    assert same_bits(grads[0][1], grads[1][1])


def test_random_gates_are_not_drawn_again() -> None:
    """The function runs once a pass: what it drew is what is computed with again."""
    grads = []
    for how in (None, "not reentrant"):
        generator, logits = Generator().manual_seed(5), torch.zeros(4, 1, requires_grad=True)
        calls = []

        def draw(
            value: Tensor, generator: Generator = generator, calls: Any = calls, logits: Tensor = logits
        ) -> Tensor:
            calls.append(recomputing())
            noise = torch.rand(logits.shape, generator=generator)
            return mix(value, (logits + noise).sigmoid(), torch.zeros(4))

        model = Segment(how)
        with Tap(model, replace={Site.parse("a:output"): draw}):
            model(X).sum().backward()
        assert calls == [False]
        assert logits.grad is not None
        grads.append(logits.grad)
    assert same_bits(*grads)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_reading_shifts_no_numbers_and_changes_no_gradient(how: str) -> None:
    grads = []
    for kind in (None, how):
        model, x = Segment(kind), X.clone().requires_grad_()
        with Tap(model, read=[Site.parse("a:output"), Site.parse("b@1:output")]) as tap:
            result = model(x)
            before = {key: value.detach().clone() for key, value in tap.values.items()}
            result.sum().backward()
            assert list(tap.values) == list(before)
            assert all(same_bits(tap.values[key], value) for key, value in before.items())
        assert x.grad is not None
        grads.append(x.grad)
    assert same_bits(*grads)


@pytest.mark.parametrize("read", [True, False])
def test_backward_after_the_tap_is_refused(read: bool) -> None:
    """Weights that are frozen no longer would be saved in the place of inputs, without an error of PyTorch's."""
    model, x = Segment("not reentrant"), X.clone().requires_grad_()
    site = Site.parse("a:output")
    sample = torch.full((4, 1), 0.5, requires_grad=True)
    with Tap(model, [site] if read else [], {} if read else {site: half(sample)}):
        result = model(x).sum()
    with pytest.raises(GradientError, match=r"after the tap was closed.*gradient_checkpointing_disable"):
        result.backward()
    assert x.grad is None


def test_sites_beside_it_may_be_late_while_weights_stay_frozen() -> None:
    """As in training, where the model is frozen throughout."""
    grads = []
    for how in (None, "not reentrant"):
        model = nn.Sequential(nn.Linear(4, 4), Segment(how))
        model[0].weight.data.copy_(X)
        model[0].bias.data.zero_()
        sample = torch.full((4, 1), 0.5, requires_grad=True)
        with frozen(model):
            with Tap(model, replace={Site.parse("0:output"): half(sample)}):
                result = model(X).sum()
            result.backward()
        assert sample.grad is not None
        grads.append(sample.grad)
        with Tap(model, replace={Site.parse("0:output"): half(sample)}):
            result = model(X).sum()
        if how is not None:
            with pytest.raises(GradientError, match="frozen weights"):
                result.backward()
    assert same_bits(*grads)


def test_gates_in_reentrant_checkpointing_are_refused() -> None:
    model, sample = Segment("reentrant"), torch.full((4, 1), 0.5, requires_grad=True)
    with (
        pytest.raises(GradientError, match=r"site a:output: its module runs without gradients.*use_reentrant=False"),
        Tap(model, replace={Site.parse("a:output"): half(sample)}),
    ):
        model(X.clone().requires_grad_())
    with torch.no_grad(), Tap(model, replace={Site.parse("a:output"): half(sample)}):
        assert not same_bits(model(X.clone().requires_grad_()), Segment(None)(X))


def test_what_does_not_learn_in_reentrant_checkpointing() -> None:
    """The gradient is the right one inside the tap; after it, it would be that of another model."""
    grads = []
    for how in (None, "reentrant"):
        model, x = Segment(how), X.clone().requires_grad_()
        replace = {Site.parse("b@1:output"): lambda value: value.clamp(max=0.1)}
        with Tap(model, replace=replace):
            model(x).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
        with Tap(model, replace=replace):
            result = model(x).sum()
        if how is not None:
            with pytest.raises(GradientError, match="after the tap was closed"):
                result.backward()
    assert same_bits(*grads)
    model, x = Segment("reentrant"), X.clone().requires_grad_()
    source = Generator().manual_seed(0)
    replace = {Site.parse("a:output"): lambda value: value * torch.rand(1, generator=source)}
    with pytest.raises(GradientError, match="replacement comes out differently"), Tap(model, replace=replace):
        model(x).sum().backward()


def test_backward_of_an_earlier_pass_is_refused() -> None:
    model, sample = Segment("not reentrant"), torch.full((4, 1), 0.5, requires_grad=True)
    with (
        pytest.raises(GradientError, match=r"no call in the latest pass.*Run backward after each pass"),
        Tap(model, replace={Site.parse("a:output"): half(sample)}),
    ):
        sum(model(x).sum() for x in (X, X + 1)).backward()


def test_a_module_under_no_grad() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.body(x)
            result: Tensor = self.head(hidden)
            return result

    model, learned = Backbone(), torch.zeros(4, requires_grad=True)
    for address, message in [("body:output", "runs without gradients"), (":input", "no output of the model does")]:
        replace = {Site.parse(address): lambda value: value + learned}
        with pytest.raises(GradientError, match=message), Tap(model, replace=replace):
            model(X)
    with Tap(model, replace={Site.parse("body:output"): torch.zeros_like}):
        model(X)  # nothing learns
    with Tap(model, replace={Site.parse("head:input"): lambda value: value + learned}):
        model(X).sum().backward()
    assert learned.grad is not None


def test_a_loss_on_a_value_that_was_read() -> None:
    """The outputs carry no gradient, but the value between does."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).argmax(-1)  # type: ignore[no-any-return]

    model, learned = Picks(), torch.zeros(4, requires_grad=True)
    replace = {Site.parse("a:output"): lambda value: value + learned}
    with Tap(model, [Site.parse("b:output")], replace) as tap:
        model(X)
        tap.values["b:output"].sum().backward()
    assert learned.grad is not None
    with pytest.raises(GradientError), Tap(model, replace=replace):
        model(X)


def test_hooks_of_the_callers_own_on_saved_tensors() -> None:
    model, sample = Segment(None), torch.full((4, 1), 0.5, requires_grad=True)
    with torch.autograd.graph.save_on_cpu(), Tap(model, replace={Site.parse("a:output"): half(sample)}):
        result = model(X).sum()
    result.backward()
    assert sample.grad is not None


def test_a_whole_tapped_model_inside_checkpointing() -> None:
    model, x = Segment(None), X.clone().requires_grad_()
    with Tap(model, read=[Site.parse("b@*:output")]) as tap:
        checkpoint(model, x, use_reentrant=False).sum().backward()
        assert list(tap.values) == ["b@0:output", "b@1:output"]
    assert x.grad is not None
