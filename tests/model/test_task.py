"""Tasks: batches of every kind become a call; masks, names, and other inputs of the same shape."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical

from maskhooks.errors import BatchError, SettingError, UnknownDistributionError
from maskhooks.model.task import Task, device_of, move
from maskhooks.sites.site import Site

X = torch.arange(6.0).reshape(2, 3)
SITE = Site.parse("x:output", "batch token -> batch token")
Pair = namedtuple("Pair", ["x", "y"])


class Model(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


class Takes(nn.Module):
    def forward(self, *args: Tensor) -> int:
        return len(args)


class Any1(nn.Module):
    def forward(self, pair: Any) -> Any:
        return pair


@pytest.mark.parametrize(
    "batch", [X, (X,), [X], {"x": X}, OrderedDict(x=X), UserDict(x=X), (X, 1.0), (X, 1.0, "a label")]
)
def test_default_call(batch: Any) -> None:
    """Trailing labels in a tuple are left out: as many items as forward takes."""
    assert torch.equal(Task().call(Model(), batch), X)


def test_default_call_with_any_number_of_arguments() -> None:
    assert Task().call(Takes(), (X, X, X)) == 3


def test_other_objects_are_passed_as_they_are() -> None:
    pair = Pair(X, X)
    assert Task().call(Any1(), pair) is pair


def test_call_given() -> None:
    assert torch.equal(Task(call=lambda model, batch: model(batch["data"])).call(Model(), {"data": X}), X)


@pytest.mark.parametrize("batch", [{"y": X}, {"x": X, "labels": X}, {}, ()])
def test_a_batch_that_does_not_fit(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"does not fit Model\.forward\(x.*wrap\(model, call=lambda"):
        Task().call(Model(), batch)


def test_an_error_of_the_model_is_the_models_own() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        Task().call(Fails(), X)


def test_distribution() -> None:
    for output in (
        lambda out: Categorical(logits=out),
        lambda out, batch: Categorical(logits=out + len(batch)),
    ):
        found = Task(output=output).distribution(X, (X,))
        assert isinstance(found, Categorical)
    with pytest.raises(UnknownDistributionError, match="outputs of type Tensor"):
        Task().distribution(X, (X,))
    with pytest.raises(UnknownDistributionError, match="outputs of type Tensor"):
        Task(output=lambda out: out).distribution(X, (X,))


def test_real_positions() -> None:
    assert Task().valid(SITE, (X,), X).all()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(Task(valid=lambda batch: mask).valid(SITE, (X,), X), mask.bool())
    assert torch.equal(Task(valid=lambda batch, site: mask.numpy()).valid(SITE, (X,), X), mask.bool())
    with pytest.raises(
        BatchError, match=r"shape \[2, 2\], but site x:output has positions \(batch, token\) of shape \[2, 3\]"
    ):
        Task(valid=lambda batch: mask[:, :2]).valid(SITE, (X,), X)


def test_a_mask_may_go_on_with_padding_where_a_site_has_ended() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    numbers = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 1, 1]])
    task = Task(valid=lambda batch: mask, units=lambda batch: numbers)
    assert torch.equal(task.valid(SITE, (X,), X), mask[:, :3])
    found = task.units(SITE, (X,), {str(SITE): X})
    assert found is not None
    assert torch.equal(found, numbers[:, :3])
    for other in (mask.roll(1, 1), mask & (torch.arange(5) < 2), mask[:1]):
        with pytest.raises(BatchError, match="the mask of valid positions has shape"):
            Task(valid=lambda batch, other=other: other).valid(SITE, (X,), X)  # type: ignore[misc]
    with pytest.raises(BatchError, match="the units have shape"):
        Task(units=lambda batch: numbers).units(SITE, (X,), {str(SITE): X})


def test_names() -> None:
    assert Task().names(SITE, X) is None
    assert Task(names=lambda batch: [["a", "b"]]).names(SITE, X) == [["a", "b"]]


def test_given_functions_go_in_front() -> None:
    task = Task(names=lambda batch: [["a"]])
    changed = task.with_options({"names": lambda batch: [["b"]]})
    assert changed.names(SITE, X) == [["b"]]
    assert task.names(SITE, X) == [["a"]]
    with pytest.raises(
        SettingError,
        match=r"no setting 'tokenizer' for this model, whose task is 'function'.* call, output, valid, names, perturb",
    ):
        task.with_options({"tokenizer": None})


# Another input of the same shape and padding


def perturb(task: Task, batch: Any, seed: int = 0) -> Any:
    return task.perturb(batch, Generator().manual_seed(seed))


def test_vary_permutes_among_real_positions() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])  # 0 pads, and the ids are no mask all the same
    valid = ids != 0
    batch = {"ids": ids, "mask": valid.long(), "flags": valid, "labels": torch.tensor([0, 1])}
    varied = perturb(Task(valid=lambda batch: batch["ids"] != 0), batch)
    assert not torch.equal(varied["ids"], ids)
    assert sorted(varied["ids"][valid].tolist()) == [5, 6, 7, 8]
    assert varied["ids"][~valid].eq(0).all()
    for key in ("mask", "flags", "labels"):
        assert torch.equal(varied[key], batch[key])
    assert ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]


def test_vary_without_a_mask_permutes_examples() -> None:
    varied = perturb(Task(), (X, torch.tensor([0, 1])), seed=1)
    assert sorted(varied[0].tolist()) == sorted(X.tolist())


@pytest.mark.parametrize("batch", [(X[:1],), {"ids": torch.arange(4).reshape(2, 2)}, "text"])
def test_vary_where_nothing_can_be_made(batch: Any) -> None:
    """One example, or token ids without a word about padding: no other input, and not the same one either."""
    assert perturb(Task(), batch) is None


def test_vary_given() -> None:
    assert perturb(Task(perturb=lambda batch, generator: batch + 1), 1) == 2


def test_vary_is_reproducible_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    x = torch.randn(20, 3, generator=Generator().manual_seed(0))
    assert torch.equal(perturb(Task(), (x,))[0], perturb(Task(), (x,))[0])
    assert torch.equal(torch.get_rng_state(), state)


# Devices


@dataclass
class Box:
    x: Tensor
    name: str = "n"


@pytest.mark.parametrize(
    "batch", [X, (X, "s"), [X], {"x": [X]}, Pair(X, None), Box(X), UserDict(x=X), defaultdict(list, x=X)]
)
def test_move(batch: Any) -> None:
    from maskhooks.sites import nested

    moved = move(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert [tensor.device.type for _, tensor in nested.tensors(moved)] == ["meta"]
    assert [path for path, _ in nested.tensors(moved)] == [path for path, _ in nested.tensors(batch)]
    assert move("text", torch.device("meta")) == "text"


def test_device_of() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"
