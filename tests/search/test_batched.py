"""Searches where each example has rows of its own: what trying every set of a small graph by hand finds."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Beam, Erasure, LeaveOneOut
from maskhooks.errors import MaskhooksWarning, ResumeError, SearchLimitError, SearchLimitWarning, SettingError
from maskhooks.masks.baselines import Mean, Token
from maskhooks.model.outputs import kl
from maskhooks.search import batched
from maskhooks.search.batched import BatchQuestions
from tests.conftest import fingerprint

INDEX = torch.tensor([1, 0, 3, 1, 0, 1, 3, 1])  # of four examples, the third of which has no row
HEADS = "row (head dim) -> row head, head=2"


class Summed(nn.Module):
    """A class for each example, from the sum of its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.row = nn.Linear(3, 4)
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))

    def forward(self, rows: Tensor, index: Tensor, examples: int) -> Tensor:
        logits: Tensor = 4 * self.last(torch.zeros(examples, 4).index_add(0, index, self.row(rows)))
        return logits


def batch() -> tuple[Tensor, Tensor, int]:
    return 2 * torch.randn(8, 3, generator=torch.Generator().manual_seed(3)), INDEX, 4


def wrapped(pattern: str = "row feature -> row", **more: Any) -> maskhooks.Hooked:
    return maskhooks.wrap(
        Summed(),
        sites={"row:output": pattern},
        output=lambda logits: Categorical(logits=logits),
        example_index=lambda batch: batch[1],
        **more,
    )


def outputs(model: Any, gates: Tensor, closed: float | Tensor = 0.0) -> Categorical:
    """By hand: gates over rows and features."""
    rows, index, _ = batch()
    values = torch.where(gates > 0, model.row(rows), torch.as_tensor(closed))
    return Categorical(logits=4 * model.last(torch.zeros(4, 4).index_add(0, index, values)))


def smallest(model: Any, example: int, units: list[Tensor], margin: float) -> list[tuple[int, ...]]:
    """All smallest sets of units of an example, by trying every one.

    Args:
        units: gates of each, `row feature`.
    """
    for size in range(len(units) + 1):
        found = []
        for kept in itertools.combinations(range(len(units)), size):
            closed = sum((units[unit] for unit in range(len(units)) if unit not in kept), torch.zeros(8, 4))
            if kl(outputs(model, torch.ones(8, 4)), outputs(model, 1 - closed))[example] <= margin:
                found.append(kept)
        if found:
            return found
    raise AssertionError


def of_rows(rows: list[int]) -> list[Tensor]:
    return [torch.eye(8)[row][:, None].expand(-1, 4) for row in rows]


@pytest.mark.parametrize("margin", [0.01, 0.1])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_all_smallest_sets_of_each_example(margin: float, batch_size: int) -> None:
    hooked = wrapped()
    before = fingerprint(hooked.model)
    found = Erasure(hooked, "row:output", margin=margin, batch_size=batch_size).search(batch(), progress=False)
    assert fingerprint(hooked.model) == before
    for example, one in enumerate(found):
        rows = (example == INDEX).nonzero()[:, 0].tolist()
        assert one.positions == len(rows)
        assert list(one.solutions) == smallest(hooked.model, example, of_rows(rows), margin)
    assert max(one.lower_bound for one in found) > 1


def test_rows_of_an_explanation() -> None:
    hooked = wrapped()
    erasure = Erasure(hooked, "row:output", margin=0.1)
    found = erasure.search(batch(), progress=False)
    rows = erasure.explain(batch())
    assert rows["example"].tolist() == INDEX.tolist()
    for example, one in enumerate(found):
        own = rows["score"][rows["example"] == example].tolist()
        assert own == [float(place in one.solutions[0]) for place in range(one.positions)]
        assert rows.metadata[example]["search"] == str(one)
    assert rows.metadata[2]["search"] == "0 of 0 positions: {}"


def test_each_row_left_out() -> None:
    hooked = wrapped()
    scores = LeaveOneOut(hooked, "row:output").explain(batch())["score"]
    for row, example in enumerate(INDEX.tolist()):
        gates = 1 - of_rows([row])[0]
        moved = kl(outputs(hooked.model, torch.ones(8, 4)), outputs(hooked.model, gates))[example]
        assert scores[row] == pytest.approx(1 - (-moved).exp().item(), abs=1e-5)


def test_as_many_passes_as_the_largest_example_has_rows() -> None:
    hooked = wrapped(skip_checks=["model"])
    passes = []
    handle = hooked.model.register_forward_pre_hook(lambda *_: passes.append(1))
    LeaveOneOut(hooked, "row:output").explain(batch())
    handle.remove()
    assert len(passes) == 1 + 4


def picked(batch: Any, numbers: list[int]) -> Any:
    rows, index, _ = batch
    own = [(index == number).nonzero()[:, 0] for number in numbers]
    sizes = torch.tensor([*map(len, own)])
    return rows[torch.cat(own)], torch.arange(len(own)).repeat_interleave(sizes), len(own)


def test_a_batch_of_those_that_are_asked_about_takes_fewer_passes() -> None:
    def wrong(batch: Any, numbers: list[int]) -> Any:
        rows, index, count = picked(batch, numbers)
        return rows.flip(0), index, count

    found, passes = {}, dict.fromkeys(("none", "picked", "wrong"), 0)
    for name, select in (("none", None), ("picked", picked), ("wrong", wrong)):
        hooked = wrapped(skip_checks=["model"], **({} if select is None else {"select": select}))
        before = fingerprint(hooked.model)

        def count(*_: Any, name: str = name) -> None:
            passes[name] += 1

        handle = hooked.model.register_forward_pre_hook(count)
        said = pytest.warns(MaskhooksWarning, match="different outputs. .* select=lambda")
        with said if name == "wrong" else contextlib.nullcontext():
            found[name] = [
                *(LeaveOneOut(hooked, "row:output", batch_size=size).explain(batch())["score"] for size in (4, 8, 64)),
                Beam(hooked, "row:output", margin=0.1).explain(batch())["score"],
                Erasure(hooked, "row:output", margin=0.1).explain(batch())["score"],
            ]
        handle.remove()
        assert fingerprint(hooked.model) == before
    for one, other, third in zip(*found.values(), strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=1e-5)
        assert one.tolist() == pytest.approx(third.tolist(), abs=1e-5)
    assert passes["picked"] < 0.7 * passes["none"]
    assert passes["none"] < passes["wrong"]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, KeyError, AssertionError])
def test_a_model_that_fails_on_a_batch_of_some_examples_gets_the_whole(error: type[Exception]) -> None:
    whole, hooked = wrapped(), wrapped(select=picked)

    def refuse(module: nn.Module, given: tuple[Tensor, Tensor, int]) -> None:
        if len(given[0]) != len(INDEX):
            raise error("rows are missing")

    hooked.model.register_forward_pre_hook(refuse)
    before = fingerprint(hooked.model)
    with pytest.warns(MaskhooksWarning, match=rf"{error.__name__}: '?rows are missing.*The results are the") as said:
        found = LeaveOneOut(hooked, "row:output").explain(batch())
    assert len(said) == 1
    assert found["score"].tolist() == LeaveOneOut(whole, "row:output").explain(batch())["score"].tolist()
    assert fingerprint(hooked.model) == before


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError])
@pytest.mark.parametrize("where", ["clean_pass", "BatchQuestions"])
def test_a_mistake_in_code_is_not_taken_for_a_batch_that_does_not_serve(
    where: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    member = LeaveOneOut(wrapped(select=picked), "row:output")
    own = BatchQuestions.__init__

    def mistaken(*args: Any, **kwargs: Any) -> None:
        if where == "clean_pass" or len(args[1].outputs.probs) != 4:
            raise error("mistaken")
        own(*args, **kwargs)

    if where == "BatchQuestions":
        monkeypatch.setattr(BatchQuestions, "__init__", mistaken)
    else:
        monkeypatch.setattr(batched, "clean_pass", mistaken)
    with pytest.raises(error, match="mistaken"):
        member.explain(batch())


def test_a_wide_beam_finds_the_smallest_here() -> None:
    hooked = wrapped()
    found = Erasure(hooked, "row:output", margin=0.1).search(batch(), progress=False)
    rows = Beam(hooked, "row:output", margin=0.1, width=16).explain(batch())
    for example, one in enumerate(found):
        kept = rows["kept"][rows["example"] == example]
        assert tuple(kept.nonzero()[0].tolist()) in one.solutions


def test_rows_gated_together_and_gates_within_rows() -> None:
    pairs = torch.tensor([0, 1, 2, 3, 4, 0, 2, 3])  # rows 0 and 5, 2 and 6, 3 and 7
    hooked = wrapped(units=lambda batch: pairs)
    found = Erasure(hooked, "row:output", margin=0.1).search(batch(), progress=False)
    one, two, three = (sum(of_rows(rows)) for rows in ([0, 5], [3, 7], [2, 6]))
    places = [(0,), (1,)]  # of the first row of each pair in example 1, whose rows are 0, 3, 5, 7
    assert [found[number].positions for number in range(4)] == [2, 2, 0, 1]
    wanted = smallest(hooked.model, 1, [one, two], 0.1)
    assert list(found[1].solutions) == [tuple(place for unit in kept for place in places[unit]) for kept in wanted]
    assert list(found[3].solutions) == smallest(hooked.model, 3, [three], 0.1)
    scores = LeaveOneOut(hooked, "row:output").explain(batch())["score"]
    assert scores[0] == scores[5] != scores[3] == scores[7]

    heads = wrapped(HEADS)
    found = Erasure(heads, "row:output", margin=0.1).search(batch(), progress=False)
    for example in (0, 3):
        units = []
        for row in (example == INDEX).nonzero()[:, 0].tolist():
            for head in range(2):
                unit = torch.zeros(8, 4)
                unit[row, 2 * head : 2 * head + 2] = 1
                units.append(unit)
        assert found[example].positions == 4
        assert list(found[example].solutions) == smallest(heads.model, example, units, 0.1)


@pytest.mark.parametrize("baseline", ["token", "mean"])
def test_baselines(baseline: str) -> None:
    hooked = wrapped()
    with torch.no_grad():
        values = hooked.model.row(batch()[0])
    mean = Mean()
    mean.start((4,))
    mean.fit(values)
    mean.started = True
    closing = {"token": Token(values[0]), "mean": mean}[baseline]
    vector = {"token": values[0], "mean": values.mean(0)}[baseline]
    scores = LeaveOneOut(hooked, "row:output", baseline=closing).explain(batch())["score"]
    for row, example in enumerate(INDEX.tolist()):
        masked = outputs(hooked.model, 1 - of_rows([row])[0], vector)
        moved = kl(outputs(hooked.model, torch.ones(8, 4)), masked)[example]
        assert scores[row] == pytest.approx(1 - (-moved).exp().item(), abs=1e-5)


def test_a_stopped_search_goes_on_from_a_file(tmp_path: Path) -> None:
    hooked, state = wrapped(), tmp_path / "state.json"
    wanted = Erasure(hooked, "row:output", margin=1e-3).search(batch(), progress=False)
    with pytest.warns(SearchLimitWarning, match="at row:output.*stopped by max_sets"):
        found = Erasure(hooked, "row:output", margin=1e-3, max_sets=3, batch_size=2).search(
            batch(), state=state, progress=False
        )
    assert found[1].stopped == "max_sets"
    tried = [search["tried"] for search in json.loads(state.read_text())["searches"]]
    found = Erasure(hooked, "row:output", margin=1e-3).search(batch(), state=state, progress=False)
    assert [(one.solutions, one.tried) for one in found] == [(one.solutions, one.tried) for one in wanted]
    assert any(0 < one < other.tried for one, other in zip(tried, wanted, strict=True))
    other = batch()[0], INDEX.roll(1), 4
    with pytest.raises(ResumeError, match="differ"):
        Erasure(hooked, "row:output", margin=1e-3).search(other, state=state, progress=False)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    hooked, state = wrapped(), tmp_path / "state.json"
    wanted = Erasure(hooked, "row:output", margin=1e-3).search(batch(), progress=False)
    before, left = fingerprint(hooked.model), 9

    def criterion(original: Any, masked: Any) -> Tensor:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return kl(original, masked) <= 1e-3

    erasure = Erasure(hooked, "row:output", criterion=criterion, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        erasure.search(batch(), state=state, progress=False)
    assert fingerprint(hooked.model) == before
    searches = json.loads(state.read_text())["searches"]
    assert any(one["tried"] and not one["solutions"] for one in searches)
    assert all(one["seconds"] > 0 for one in searches)
    found = erasure.search(batch(), state=state, progress=False)
    assert [(one.solutions, one.tried) for one in found] == [(one.solutions, one.tried) for one in wanted]


@pytest.mark.usefixtures("early_progress")
def test_limits_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    hooked = wrapped()
    with pytest.raises(SearchLimitError, match=r"example 1 at row:output has 4 positions, .* all 16 sets take"):
        Erasure(hooked, "row:output", max_positions=3).search(batch(), progress=False)
    Erasure(hooked, "row:output").search(batch())
    assert "searching" in capsys.readouterr().err
    with pytest.warns(SearchLimitWarning, match="stopped by time_limit"):
        Erasure(hooked, "row:output", margin=1e-9, time_limit=1e-9, batch_size=1).search(batch(), progress=False)


@pytest.mark.usefixtures("unchecked")
def test_a_divergence_without_a_row_for_each_example() -> None:
    with pytest.raises(SettingError, match="returned 1 rows for 4 examples"):
        LeaveOneOut(wrapped(), "row:output", divergence=lambda one, other: kl(one, other).mean()[None]).explain(batch())


def test_the_model_is_put_back_when_it_raises() -> None:
    hooked = wrapped()
    before = fingerprint(hooked.model)

    def fails(original: Any, masked: Any) -> Tensor:
        raise ZeroDivisionError

    for explainer in (
        Erasure(hooked, "row:output", criterion=fails),
        LeaveOneOut(hooked, "row:output", divergence=fails),
    ):
        with pytest.raises(ZeroDivisionError):
            explainer.explain(batch())
        assert fingerprint(hooked.model) == before
