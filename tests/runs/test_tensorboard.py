"""TensorBoard: the numbers of a run's logs as scalars, each step once."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import DiffMask
from maskhooks.errors import MissingExtraError, SettingError, StorageError
from maskhooks.runs.tensorboard import Board


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by tag."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def row(step: int, divergence: float, site: str = "layer.0:output", depth: int = 1) -> dict[str, object]:
    return {"step": step, "epoch": 0, "site": site, "depth": depth, "multiplier": 2.0, "divergence": divergence}


def test_rows_are_scalars_by_site(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = Board(tmp_path, [("embed:output", 0), ("embed:output", 1), ("layer.0:output", 1)])
    board.write("log", row(0, 0.5))
    board.write("log", row(1, 0.25))
    board.write("log", row(1, 0.75, "embed:output", 0))
    board.write("validation", row(2, 0.125))
    board.close()
    assert scalars(tmp_path / "train") == {
        "layer.0:output/multiplier": [(0, 2.0), (1, 2.0)],
        "layer.0:output/divergence": [(0, 0.5), (1, 0.25)],
        "embed:output depth 0/multiplier": [(1, 2.0)],
        "embed:output depth 0/divergence": [(1, 0.75)],
    }
    assert scalars(tmp_path / "validation")["layer.0:output/divergence"] == [(2, 0.125)]


def test_a_run_that_goes_on_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for begin, end, value in ((0, 6, 1.0), (3, 8, 2.0)):
        board = Board(tmp_path, [("layer.0:output", 1)])
        for step in range(begin, end):
            board.write("log", row(step, value))
        board.close()
    expected = [(step, 1.0 if step < 3 else 2.0) for step in range(8)]
    assert scalars(tmp_path / "train")["layer.0:output/divergence"] == expected


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "board").write_text("a file")
    with pytest.raises(StorageError, match="board cannot be written") as caught:
        Board(tmp_path / "board", []).write("log", row(0, 0.5))
    assert caught.value.path == tmp_path / "board"


def test_the_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskhooks\[tensorboard\]'"):
        Board(tmp_path, [])


def small() -> maskhooks.Hooked:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 2))
    sites = dict.fromkeys(("0:output", "1:output"), "batch token hidden -> batch token")
    return maskhooks.wrap(model, sites=sites, output=lambda logits: Categorical(logits=logits))


BATCHES = list(torch.randint(0, 7, (3, 8, 3), generator=torch.Generator().manual_seed(0)))


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("where", [True, "elsewhere"])
def test_a_fit_shows_the_numbers_of_its_logs(
    where: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    explainer = DiffMask(small(), sites="*")
    explainer.fit(BATCHES, BATCHES, steps=12, run_dir="run", tensorboard=where, progress=False)
    folder = tmp_path / ("run/tensorboard" if where is True else where)
    for file, run in (("log", "train"), ("validation", "validation")):
        shown = scalars(folder / run)
        with (tmp_path / "run" / f"{file}.csv").open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert rows
        assert {tag.split("/")[0] for tag in shown} == {"0:output", "1:output"}
        for key in {"divergence", "expected_l0", "agreement"} | ({"multiplier"} if file == "log" else set()):
            for site in ("0:output", "1:output"):
                logged = [(int(row["step"]), pytest.approx(float(row[key]))) for row in rows if row["site"] == site]
                assert shown[f"{site}/{key}"] == logged


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="tensorboard=True writes into run_dir"):
        DiffMask(small(), sites="*").fit(BATCHES, tensorboard=True)


def test_the_missing_package_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError):
        DiffMask(small(), sites="*").fit(BATCHES, run_dir=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
