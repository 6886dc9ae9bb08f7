"""The course of a run from its logs, and its charts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from maskhooks.errors import CorruptFileError
from maskhooks.runs.history import read_history, section
from maskhooks.viz.sections import ChartRow, Charts

LOG = """step,epoch,site,depth,multiplier,divergence,expected_l0,agreement
0,0,b:output,1,0.5,0.02,0.9,1.0
1,0,a:output,0,0.5,0.3,0.8,0.5
2,0,b:output,1,0.4,0.04,0.7,0.75
3,0,a:output,0,0.7,90.0,0.6,0.25
"""
VALIDATION = """step,site,depth,divergence,expected_l0,agreement
2,a:output,0,0.3,0.7,0.6
2,b:output,1,0.05,0.8,0.9
4,a:output,0,0.25,0.6,0.7
4,b:output,1,0.2,0.4,0.8
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log.csv").write_text(LOG)
    (tmp_path / "validation.csv").write_text(VALIDATION)
    return tmp_path


def rows(folder: Path, margin: float | None = 0.1, chosen: dict[str, int] | None = None) -> list[ChartRow]:
    (charts,) = section(read_history(folder), margin, chosen or {}).parts
    assert isinstance(charts, Charts)
    return list(charts.rows)


def test_each_masking_has_its_course(folder: Path) -> None:
    first, second = read_history(folder)
    assert (first.site, first.depth, second.site, second.depth) == ("a:output", 0, "b:output", 1)
    assert first.log["divergence"].tolist() == [0.3, 90.0]
    assert second.log["step"].tolist() == [0, 2]
    assert second.validation["expected_l0"].tolist() == [0.8, 0.4]


def test_a_run_amid_its_last_row_and_before_validation(folder: Path) -> None:
    (folder / "log.csv").write_text(LOG + "4,0,a:out")
    (folder / "validation.csv").unlink()
    first, second = read_history(folder)
    assert [len(one.log) for one in (first, second)] == [2, 2]
    assert len(first.validation) == 0
    assert [row.note for row in rows(folder)] == ["no validation data"] * 2
    (folder / "log.csv").unlink()
    assert read_history(folder) == []


def test_a_broken_log_is_named(folder: Path) -> None:
    (folder / "log.csv").write_bytes(b"step,site\n1,a\n")
    with pytest.raises(CorruptFileError, match=r"log\.csv is not a training log"):
        read_history(folder)
    (folder / "log.csv").write_bytes(LOG.replace("0.02", "much").encode())
    with pytest.raises(CorruptFileError, match="Give the folder that fit wrote"):
        read_history(folder)


def test_what_was_chosen_is_told_and_drawn(folder: Path) -> None:
    first, second = rows(folder, chosen={"a:output": 4, "b:output given b:output": 2})
    assert first.note == "chosen: step 4, 0.250 nats, 60.0% kept, 70.0% of the predictions unchanged"
    assert second.note == "chosen: step 2, 0.050 nats, 80.0% kept, 90.0% of the predictions unchanged"
    assert (first.good, second.good) == (False, True)
    divergence, kept, multiplier = second.charts
    assert [mark.filled for mark in divergence.marks] == [mark.filled for mark in kept.marks] == [True, False]
    assert divergence.vline == kept.vline == multiplier.vline == divergence.marks[0].x
    assert divergence.hline is not None
    assert (kept.hline, multiplier.hline) == (None, None)
    assert (len(multiplier.marks), divergence.last) == (0, 4)


def test_before_the_end_the_last_validation_is_told(folder: Path) -> None:
    first, second = rows(folder)
    assert first.note.startswith("last validation: step 4")
    assert all(one.vline is None for one in second.charts)
    assert [row.good for row in rows(folder, margin=None)] == [None, None]
    text = section(read_history(folder), None, {}).text
    assert "margin" not in text
    assert "nan" not in text


def test_the_margin_can_be_seen_beside_a_divergence_far_above_it(folder: Path) -> None:
    first, second = rows(folder)
    assert first.charts[0].ticks == second.charts[0].ticks
    assert math.isclose(float(first.charts[0].ticks[-1][1]), 0.4)  # five margins, not 90 nats
    assert first.charts[0].hline is not None
    assert first.charts[0].hline < first.charts[0].ticks[0][0] - 10


def test_an_infinite_divergence_is_drawn_at_the_top(folder: Path) -> None:
    (folder / "validation.csv").write_text(VALIDATION.replace("0.25", "inf"))
    (folder / "log.csv").write_text(LOG.replace("90.0", "inf"))
    first, _ = rows(folder)
    assert first.note.startswith("last validation: step 4, inf nats")
    assert first.charts[0].marks[1].y == 10
    assert first.charts[0].raw.endswith(",10")
    assert "nan" not in first.charts[0].raw + first.charts[0].smooth
