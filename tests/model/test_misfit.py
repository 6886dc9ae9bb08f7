"""Loaders, batches and masks that do not fit: errors that name what is wrong, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Beam, DiffMask, Erasure, Guan, Hooked, LeaveOneOut, Readout, Reinforce
from maskhooks.errors import BatchError, SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.model.task import move

STEPS = {"name": "stable", "steps": 3}


def hooked(model: nn.Module | None = None, **options: Any) -> Hooked:
    torch.manual_seed(0)
    return maskhooks.wrap(
        model or Means(),
        sites={"embed:output": "batch token hidden -> batch token"},
        output=lambda logits: Categorical(logits=logits),
        **options,
    )


class Means(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids).mean(1))
        return logits


def ids(rows: int = 3) -> Tensor:
    return torch.arange(rows * 4).reshape(rows, 4) % 10


LOADERS: dict[str, Any] = {
    "a tensor": ids(),
    "an array": np.zeros((2, 3)),
    "a mapping": {"input_ids": ids()},
    "a text": "a film",
    "bytes": b"a film",
    "a number": 5,
    "None": None,
}


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_loader(name: str) -> None:
    explainer = DiffMask(hooked(), "embed:output", recipe=STEPS)
    for call in (explainer.fit, LeaveOneOut(hooked(), "embed:output").explain_all):
        with pytest.raises(SettingError, match=r"must be a DataLoader or a list of batches, \[batch\] for"):
            call(LOADERS[name])
    if name != "None":
        with pytest.raises(SettingError, match="validation must be a DataLoader"):
            explainer.fit([ids()], LOADERS[name])


def test_a_table_and_a_graph_are_no_loaders() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(SettingError, match=r"got a DataFrame of shape \[2, 1\]"):
        LeaveOneOut(hooked(), "embed:output").explain_all(pandas.DataFrame({"text": ["a", "b"]}))
    data = pytest.importorskip("torch_geometric.data")
    with pytest.raises(SettingError, match="got Data"):
        LeaveOneOut(hooked(), "embed:output").explain_all(data.Data(x=torch.zeros(2, 3)))


def test_loaders_that_are_none_of_these_work() -> None:
    explainer = LeaveOneOut(hooked(), "embed:output")
    for loader in ((ids(), ids()), iter([ids(), ids()]), torch.utils.data.DataLoader(ids(6), 3)):
        assert len(explainer.explain_all(loader)["score"]) == 24


@pytest.mark.parametrize("batch", ["a film", ["a film", "another"], {"text": ["a film"]}, [("a", "b")]])
def test_text_says_how_to_tokenise(batch: Any) -> None:
    with pytest.raises(BatchError, match="the batch is text, and the model takes tensors"):
        LeaveOneOut(hooked(call=lambda model, batch: model.embed(batch)), "embed:output").explain(batch)


@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_batch(place: int) -> None:
    batches = [ids(), ids()]
    batches.insert(place, ids()[:0])
    for explainer in (LeaveOneOut(hooked(), "embed:output"), DiffMask(hooked(), "embed:output", recipe=STEPS)):
        with pytest.raises(BatchError, match="the batch has no example"):
            (explainer.explain_all if isinstance(explainer, LeaveOneOut) else explainer.fit)(batches)


def test_an_error_of_the_model_itself_goes_through() -> None:
    def call(model: nn.Module, batch: Any) -> Any:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match=r"^of its own$"):
        LeaveOneOut(hooked(call=call), "embed:output").explain(ids())


@pytest.mark.parametrize("mask", [[0.0, -1e9, 0, 0], [1.0, 0.5, 1, 1], [1.0, float("nan"), 1, 1], [2, 1, 1, 1]])
def test_a_mask_of_other_values_than_0_and_1(mask: list[float]) -> None:
    wrapped = hooked(valid=lambda batch: torch.tensor([mask] * 3))
    with pytest.raises(BatchError, match="valid says which positions are no padding"):
        LeaveOneOut(wrapped, "embed:output").explain(ids())


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.uint8, torch.bool])
def test_masks_of_0_and_1_of_any_type(kind: torch.dtype) -> None:
    wrapped = hooked(valid=lambda batch: torch.tensor([[1, 1, 0, 1]] * 3).to(kind))
    found = LeaveOneOut(wrapped, "embed:output").explain(ids())
    assert found["valid"].reshape(3, 4).tolist() == [[True, True, False, True]] * 3


EXPLAINERS: dict[str, Callable[[Hooked], Explainer]] = {
    "leave-one-out": lambda wrapped: LeaveOneOut(wrapped, "embed:output"),
    "erasure": lambda wrapped: Erasure(wrapped, "embed:output"),
    "beam": lambda wrapped: Beam(wrapped, "embed:output"),
}


@pytest.mark.parametrize("name", EXPLAINERS)
def test_padding_alone(name: str) -> None:
    wrapped = hooked(valid=lambda batch: torch.zeros(3, 4))
    with pytest.raises(BatchError, match="no position of this batch is valid at embed:output: all are padding"):
        EXPLAINERS[name](wrapped).explain(ids())


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_model_that_takes_batches_of_one_size(name: str) -> None:
    class Fixed(Means):
        def __init__(self) -> None:
            super().__init__()
            self.start = torch.zeros(3, 4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head((self.embed(ids) + self.start).mean(1))
            return logits

    wrapped = hooked(Fixed())
    with pytest.raises(BatchError, match=r"ran a batch of 3 examples, but fails on one of \d+, copies of example"):
        EXPLAINERS[name](wrapped).explain(ids())


MADE: dict[str, Callable[[Hooked], Explainer]] = {
    "diffmask": lambda wrapped: DiffMask(wrapped, "embed:output", recipe=STEPS),
    "language": lambda wrapped: DiffMask(
        wrapped, "embed:output", recipe={"name": "language", "steps": 8, "warm_start_batches": 1}
    ),
    "per example": lambda wrapped: DiffMask(wrapped, "embed:output", amortized=False, recipe=STEPS),
    "reinforce": lambda wrapped: Reinforce(wrapped, "embed:output", recipe=STEPS),
    "readout": lambda wrapped: Readout(wrapped, "embed:output", recipe={"name": "readout", "steps": 3}),
    "guan": lambda wrapped: Guan(wrapped, "embed:output"),
}


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MaskhooksWarning")
@pytest.mark.parametrize("name", MADE)
def test_float64_by_default(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        explainer = MADE[name](hooked()).fit([ids()], [ids()])
        found = explainer.explain(ids())["score"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.isfinite(found).all()


def test_a_batch_that_moves_itself_is_copied() -> None:
    class Moves(dict[str, Tensor]):
        def to(self, device: Any) -> Moves:
            for key in self:
                self[key] = self[key].to(device)
            return self

        def __copy__(self) -> Moves:
            return Moves(self)

    batch = Moves(x=torch.ones(2))
    moved = move(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert not batch["x"].is_meta


@pytest.mark.parametrize(("kind", "room"), [("bert", 16), ("roberta", 14)])
def test_texts_longer_than_the_model_reads(kind: str, room: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        pad_token_id=1,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    explainer = LeaveOneOut(maskhooks.wrap(model), "input")
    explainer.explain({"input_ids": torch.full((2, room), 5)})
    with pytest.raises(BatchError, match=rf"has {room + 1} tokens, and .* has positions for {room}. Cut texts"):
        explainer.explain({"input_ids": torch.full((2, room + 1), 5)})


def test_an_additive_attention_mask() -> None:
    inputs = pytest.importorskip("maskhooks_transformers.inputs")
    batch = {"input_ids": ids(), "attention_mask": torch.tensor([[0.0, 0.0, 0.0, -1e4]] * 3)}
    with pytest.raises(BatchError, match="attention_mask says which positions are no padding"):
        inputs.valid_tokens(batch)
