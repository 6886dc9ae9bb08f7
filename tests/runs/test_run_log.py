"""Logs: rows as they come, exact, and cut off where a saved run ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from maskhooks.errors import CorruptFileError, StorageError
from maskhooks.runs.run_log import RunLog

ROWS = [
    {"step": step, "site": "a.0:output[0]" if step % 2 else '7,"x"', "divergence": 0.1 * step, "none": None}
    for step in range(5)
]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for row in (*ROWS, {"step": 5, "site": "7", "divergence": math.inf, "none": 1e-30}):
            log.write("log", row)
        end = log.positions()
    with RunLog(tmp_path) as log:
        found = log.resume(end)["log"]
    assert found == [*ROWS, {"step": 5, "site": "7", "divergence": math.inf, "none": 1e-30}]


def test_what_came_after_the_state_is_cut_off(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for row in ROWS[:2]:
            log.write("log", row)
        end = log.positions()
        for row in ROWS[2:4]:
            log.write("log", row)
        log.write("validation", {"step": 3})
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4,torn")
    with RunLog(tmp_path) as log:
        assert log.resume(end) == {"log": ROWS[:2]}
        for row in ROWS[2:]:
            log.write("log", row)
        log.write("validation", {"step": 4})
        end = log.positions()
    with RunLog(tmp_path) as log:
        assert log.resume(end) == {"log": ROWS, "validation": [{"step": 4}]}


def test_lost_rows_are_noticed(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("log", ROWS[0])
        end = log.positions()
    (tmp_path / "log.csv").write_text("step")
    for _ in range(2):
        with RunLog(tmp_path) as log, pytest.raises(CorruptFileError, match=r"log\.csv has lost rows"):
            log.resume(end)
        (tmp_path / "log.csv").unlink(missing_ok=True)


def test_without_a_folder_rows_are_dropped() -> None:
    with RunLog(None) as log:
        log.write("log", ROWS[0])
        assert log.positions() == {}
        assert log.resume({}) == {}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with RunLog(tmp_path / "file") as log, pytest.raises(StorageError, match="cannot be written"):
        log.write("log", ROWS[0])
