"""Erasure, beam search and leave-one-out on models whose smallest sets are known."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import maskhooks
from maskhooks import Beam, Erasure, LeaveOneOut
from maskhooks.errors import BatchError, CorruptFileError, MaskhooksError, SettingError, StorageError
from maskhooks.model.outputs import kl

TOKENS = "batch token hidden -> batch token"


class Sum(nn.Module):
    """The class is whether the numbers of the real positions add up to more than two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 1)
        self.embed.weight.data = torch.arange(8.0)[:, None]

    def forward(self, ids: Tensor, lengths: Tensor) -> Categorical:
        there = torch.arange(ids.shape[1]) < lengths[:, None]
        total = torch.where(there, self.embed(ids)[..., 0], 0).sum(1)
        return Categorical(logits=torch.stack([2.5 - total, total - 2.5], 1))


BATCH = torch.tensor([[1, 2, 1, 0, 7], [1, 1, 0, 0, 0], [7, 1, 3, 2, 0]]), torch.tensor([4, 5, 3])


def valid(batch: Any) -> Tensor:
    return torch.arange(5) < batch[1][:, None]


@pytest.fixture
def hooked() -> maskhooks.Hooked:
    return maskhooks.wrap(Sum(), sites={"embed:output": TOKENS}, valid=valid)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_all_smallest_sets(hooked: maskhooks.Hooked, batch_size: int) -> None:
    found = Erasure(hooked, "embed:output", batch_size=batch_size).search(BATCH, progress=False)
    assert [one.solutions for one in found] == [((0, 1), (1, 2)), ((),), ((0,), (2,))]
    assert [one.positions for one in found] == [4, 5, 3]
    assert [one.tried for one in found] == [1 + 4 + 6, 1, 1 + 3]


def test_rows_show_the_first_set_and_examples_the_others(hooked: maskhooks.Hooked) -> None:
    explanation = Erasure(hooked, "embed:output").explain(BATCH)
    assert explanation.select(example=0)["score"].tolist() == [1, 1, 0, 0]
    assert not explanation.select(example=1)["kept"].any()
    assert explanation.select(example=2)["kept"].tolist() == [True, False, False]
    assert explanation.metadata[0]["search"] == "2 of 4 positions: {0 1}, {1 2}"
    assert explanation.metadata[2]["prediction"] == "1"
    assert explanation.provenance["criterion"] == "agreement"


def test_a_margin_and_a_criterion_decide(hooked: maskhooks.Hooked) -> None:
    (one, *_) = Erasure(hooked, "embed:output", margin=1e-6).search(BATCH, progress=False)
    assert one.solutions == ((0, 1, 2),)  # every number that is not zero
    never_less = Erasure(hooked, "embed:output", criterion=lambda y, masked: masked.logits[:, 1] >= y.logits[:, 1])
    assert never_less.search(BATCH, progress=False)[0].solutions == ((0, 1, 2),)
    baseline = maskhooks.Erasure(hooked, "embed:output", baseline=_two())
    assert baseline.search(BATCH, progress=False)[0].solutions == ((),)  # four twos are more than two


def _two() -> Any:
    from maskhooks.masks.baselines import Token

    return Token(torch.tensor([2.0]))


def test_units_are_closed_together() -> None:
    pieces = torch.tensor([[0, 0, 1, 2, 2]]).expand(3, -1)
    hooked = maskhooks.wrap(
        Sum(), sites={"embed:output": TOKENS}, valid=valid, units=lambda batch: pieces[: len(batch[0])]
    )
    erasure = Erasure(hooked, "embed:output")
    assert [one.solutions for one in erasure.search(BATCH, progress=False)] == [((0,),), ((),), ((0,), (2,))]
    assert erasure.explain(BATCH).select(example=0)["kept"].tolist() == [True, True, False, False]


def test_groups_within_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(12, 3))
    pattern = "batch token (head dim) -> batch head token, head=2"
    hooked = maskhooks.wrap(model, sites={"0:output": pattern}, output=lambda logits: Categorical(logits=3 * logits))
    x = torch.randn(4, 2, 4)
    h = model[0](x).view(4, 2, 2, 3)  # example token head dim
    wanted = model(x).argmax(-1)
    for example, found in enumerate(Erasure(hooked, "0:output").search(x, progress=False)):
        right = {}
        for kept in itertools.product([0.0, 1.0], repeat=4):
            gates = torch.tensor(kept).view(2, 2).t()[..., None]  # head token, as token head
            logits = model[2]((h[example] * gates).reshape(1, 12))
            right[kept] = bool(logits.argmax() == wanted[example])
        size = min(int(sum(kept)) for kept, same in right.items() if same)
        sets = {tuple(np.flatnonzero(kept)) for kept, same in right.items() if same and sum(kept) == size}
        assert set(found.solutions) == sets


def test_beam_finds_a_set_that_is_enough_and_the_smallest_here(hooked: maskhooks.Hooked) -> None:
    explanation = Beam(hooked, "embed:output", width=4).explain(BATCH)
    kept = [explanation.select(example=number)["kept"].tolist() for number in range(3)]
    assert sum(kept[0]) == 2
    assert kept[0][1]
    assert not any(kept[1])
    assert sum(kept[2]) == 1


def test_leave_one_out_is_the_divergence_of_each(hooked: maskhooks.Hooked) -> None:
    explanation = LeaveOneOut(hooked, "embed:output").explain(BATCH)
    model, (ids, lengths) = hooked.model, BATCH
    for at in range(3):
        without = ids.clone()
        without[2, at] = 0
        moved = kl(model(ids, lengths), model(without, lengths))[2]
        assert explanation.select(example=2)["score"][at] == pytest.approx(1 - (-moved).exp().item(), abs=1e-5)


def test_outputs_that_are_no_classes() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[5.0, 0.1, 0.0]])
    hooked = maskhooks.wrap(
        nn.Sequential(nn.Identity(), model),
        sites={"0:output": "batch feature -> batch feature"},
        output=lambda mean: Normal(mean[:, 0], 1.0),
    )
    assert Erasure(hooked, "0:output").search(torch.ones(1, 3), progress=False)[0].solutions == ((0,),)


def test_batches_of_which_examples_cannot_be_taken() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, rows: list[Tensor]) -> Tensor:
            return self.linear(torch.stack(rows))

    sites, rows = {"linear:output": "batch feature -> batch feature"}, list(torch.randn(3, 4).unbind(0))
    settings: dict[str, Any] = {"sites": sites, "output": lambda logits: Categorical(logits=logits)}
    settings["call"] = lambda model, batch: model(batch)
    with pytest.raises(BatchError, match="select="):
        Erasure(maskhooks.wrap(Odd(), **settings), "linear:output").search(rows, progress=False)
    hooked = maskhooks.wrap(Odd(), **settings, select=lambda batch, numbers: [batch[number] for number in numbers])
    found = Erasure(hooked, "linear:output").search(rows, progress=False)
    assert all(one.solutions for one in found)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {name: 0}
            for name in (
                "margin",
                "max_positions",
                "max_sets",
                "time_limit",
                "max_set_size",
                "batch_size",
                "memory_limit",
            )
        ),
        {"margin": 0.1, "criterion": lambda one, other: one},
    ],
)
def test_settings_out_of_range(hooked: maskhooks.Hooked, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Erasure(hooked, "embed:output", **wrong)
    with pytest.raises(SettingError):
        Beam(hooked, "embed:output", width=0)


def test_a_file_that_is_no_state(hooked: maskhooks.Hooked, tmp_path: Any) -> None:
    (tmp_path / "state").write_text("[]")
    with pytest.raises(CorruptFileError, match="Remove it"):
        Erasure(hooked, "embed:output").search(BATCH, state=tmp_path / "state", progress=False)


@pytest.mark.usefixtures("early_progress")
def test_progress_tells_where_the_search_is(hooked: maskhooks.Hooked, capsys: pytest.CaptureFixture[str]) -> None:
    Erasure(hooked, "embed:output").search(BATCH)
    assert re.search(r"^searching: 0 of \d+ .*, sets of 0 of \d+, \d+ tried$", capsys.readouterr().err, re.M)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_set_size": 2.5}, "max_set_size must be a whole number from 1 or None, got 2.5"),
        ({"max_positions": "20"}, "max_positions must be a whole number from 1, got '20'"),
        ({"criterion": "agreement"}, "criterion must be a function or None, got 'agreement'"),
        ({"baseline": "mean"}, "the baseline Mean needs training data, which a search does not see"),
        ({"baseline": "learned"}, "the baseline Learned needs training data"),
        ({"baseline": "zeros"}, "no baseline is named 'zeros'"),
        ({"criterion": lambda original, masked: True}, "a truth value for each row, got True"),
        ({"criterion": lambda original, masked: masked.probs}, r"a truth value for each row, got shape \[\d+, 2\]"),
    ],
)
def test_bad_settings(hooked: maskhooks.Hooked, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskhooksError, match=message):
        maskhooks.Erasure(hooked, "embed:output", **settings).search(BATCH, progress=False)


def test_a_folder_is_no_state(hooked: maskhooks.Hooked, tmp_path: Any) -> None:
    with pytest.raises(StorageError, match=r"is a folder\. Name a file"):
        maskhooks.Erasure(hooked, "embed:output").search(BATCH, state=tmp_path, progress=False)
