"""Taps over several passes: nested, entered again, around parts that run alone and models that call themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskhooks.errors import SiteConflictError, SiteNeverFiredError
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site
from tests.conftest import same_bits
from tests.models import MLP, Broken, Nested, Tiny

site = Site.parse


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


def test_a_tap_can_be_entered_again() -> None:
    model = MLP()
    tap = Tap(model, read=[site("first:output")])
    for _ in range(2):
        with tap:
            model.run()
        assert "first:output" in tap.values


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
