"""Two threads on one model: values are right, or the second is refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Hooked, LeaveOneOut
from maskhooks.errors import TappedModelError
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site


def hooked(model: nn.Module | None = None) -> Hooked:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, 3))
    return maskhooks.wrap(
        model,
        sites={"0:output": "batch token hidden -> batch token"},
        output=lambda logits: Categorical(logits=logits),
    )


def ids() -> Tensor:
    return torch.arange(12).reshape(2, 6) % 10


def in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in another thread, and return its result or its error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_tap_while_another_thread_taps_is_refused() -> None:
    one = hooked()
    with Tap(one.model, [Site.parse("0:output")]) as tap:
        one(ids())
        error = in_thread(lambda: LeaveOneOut(one, "0:output").explain(ids()))
        assert isinstance(error, TappedModelError)
        assert "MainThread, taps this model" in str(error)
        one(ids())
        assert tap.values["0:output"].shape == (2, 6, 4)
    assert len(in_thread(lambda: LeaveOneOut(one, "0:output").explain(ids()))["score"]) == 12


def test_a_plain_pass_of_another_thread_is_refused() -> None:
    """It would be masked, without a word."""
    one = hooked()
    with one.tap(replace={"0:output": torch.zeros_like}):
        assert isinstance(in_thread(lambda: one.model(ids())), TappedModelError)
        one(ids())
    assert torch.equal(in_thread(lambda: one.model(ids())), one.model(ids()))


def test_a_copy_for_each_thread() -> None:
    one = hooked()
    wanted = LeaveOneOut(one, "0:output").explain(ids())["score"]
    other = hooked(copy.deepcopy(one.model))
    with one.tap(read="0:output"):
        one(ids())
        assert (in_thread(lambda: LeaveOneOut(other, "0:output").explain(ids()))["score"] == wanted).all()


def test_many_threads_are_right_or_refused() -> None:
    one = hooked()
    found: list[bool | None] = []
    wanted = LeaveOneOut(one, "0:output").explain(ids())["score"]

    def attempt() -> bool | None:
        try:
            return bool((LeaveOneOut(one, "0:output").explain(ids())["score"] == wanted).all())
        except TappedModelError:
            return None

    def run() -> None:
        found.extend(attempt() for _ in range(10))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert False not in found
    assert True in found
    assert not one.model.training or one.model[2].weight.requires_grad
    assert (LeaveOneOut(one, "0:output").explain(ids())["score"] == wanted).all()


def test_a_failed_tap_takes_no_turn() -> None:
    one = hooked()
    tap = Tap(one.model, [Site.parse("0:output")])
    with tap:
        one(ids())
        with pytest.raises(maskhooks.errors.SiteConflictError):
            tap.__enter__()
    assert not isinstance(in_thread(lambda: LeaveOneOut(one, "0:output").explain(ids())), Exception)
