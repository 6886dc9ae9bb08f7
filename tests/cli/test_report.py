"""`maskhooks report`, after fit and explain."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from maskhooks.explanations.explanation import Explanation

Run = Callable[..., Result]


@pytest.fixture
def made(run: Run, network: str, tmp_path: Path) -> Path:
    """The current folder, with a run and what its masks say of the network's batches."""
    for words in (["fit", f"{network}:with_data", "--steps", 6, "--out", "run"],
                  ["explain", "run", f"{network}:with_data", "--out", "explained", "--plots", 0]):  # fmt: skip
        done = run(*words)
        assert done.exit_code == 0, done.stderr
    return tmp_path


def test_run_and_explanation_in_any_order(run: Run, made: Path) -> None:
    done = run("report", "run", "explained", "--max-examples", 3)
    assert done.exit_code == 0, done.stderr
    assert re.match(
        r"Open report\.html in a browser: its training and what is kept, in one file of \d+ kB\.", done.stdout
    )
    page = (made / "report.html").read_text(encoding="utf-8")
    assert "8 examples; the first 3 are below" in page
    again = run("report", "explained/explanation.parquet", "run", "--max-examples", 3, "--out", "deep/other.html")
    assert again.exit_code == 0, again.stderr
    assert (made / "deep" / "other.html").read_text(encoding="utf-8") == page


def test_either_is_enough(run: Run, made: Path) -> None:
    assert "its training, in one file" in run("report", "run").stdout
    assert "a browser: what is kept, in" in run("report", "explained", "--title", "Mine & <yours>").stdout
    assert "<h1>Mine &amp; &lt;yours&gt;</h1>" in (made / "report.html").read_text(encoding="utf-8")


def test_several_parquet_files_with_other_examples(run: Run, made: Path) -> None:
    whole = Explanation.from_parquet(made / "explained" / "explanation.parquet")
    for name, examples in (("first", range(5)), ("second", range(5, 8))):
        whole.select(example=examples, valid=None).to_parquet(made / f"{name}.parquet")
    assert run("report", "second.parquet", "first.parquet").exit_code == 0
    assert "8 examples" in (made / "report.html").read_text(encoding="utf-8")
    twice = run("report", "first.parquet", "explained")
    assert twice.exit_code == 2
    assert "error: examples 0 to 7 come twice." in twice.stderr


def test_a_folder_that_is_neither_is_named(run: Run, made: Path) -> None:
    (made / "empty").mkdir()
    neither = run("report", "run", "empty")
    assert neither.exit_code == 2
    assert "error: empty holds neither a run nor an explanation. Give a folder that maskhooks fit or" in neither.stderr
    assert "error: nowhere does not exist." in run("report", "nowhere").stderr
    shutil.copytree(made / "run", made / "copy")
    assert "error: run and copy are separate runs. Make one report for each." in run("report", "run", "copy").stderr
    assert not (made / "report.html").exists()


def test_help_shows_how(run: Run) -> None:
    shown = run("report", "--help").stdout
    assert "maskhooks report run explained --out report.html" in shown
    assert "RUN|EXPLAINED" in shown
