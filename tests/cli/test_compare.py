"""`maskhooks compare`, end to end: texts, a factory's network, a trained run, settings, errors, a second call."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from maskhooks import Comparison

pytest.importorskip("scipy")
Run = Callable[..., Result]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twelve labelled texts."""
    path = tmp_path / "texts.csv"
    words = {"good": "positive", "bad": "negative"}
    rows = [f"the film {'very ' * (i % 3)}{word} it,{label}" for i in range(6) for word, label in words.items()]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def test_texts_with_nothing_else_said(
    run: Run, bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("compare", bert, "--data", texts)
    assert done.exit_code == 0, done.stderr
    assert "12 examples at bert.embeddings.word_embeddings:output" in done.stdout
    assert re.search(r"^ leave-one-out +-?\d\.\d{3}[*~]? \[-?\d\.\d{3}, ", done.stdout, re.MULTILINE)
    assert re.search(r"comprehensiveness: \d+ of \d+ differences are real", done.stdout)
    assert (tmp_path / "comparison" / "comparison.html").exists()
    found = Comparison.load(tmp_path / "comparison" / "results")
    assert found.methods[-2:] == ["leave-one-out", "random"]
    assert found.examples == list(range(12))


def test_a_run_beside_others_and_all_files(run: Run, bert: Path, texts: Path, tmp_path: Path) -> None:
    masks, out = tmp_path / "my-run", tmp_path / "out"
    fitted = run("fit", bert, "--data", texts, "--out", masks, "--sites", "input", "--steps", 4, "--set", "margin=0.5")
    assert fitted.exit_code == 0, fitted.stderr
    words = ["compare", bert, "--data", texts, "--methods", f"{masks},leave-one-out", "--methods", "random"]
    words += ["--metrics", "morf,divergence", "--set", "morf.steps=4", "--set", "leave-one-out.batch_size=7"]
    words += ["--limit", 6, "--batch-size", 4, "--out", out, "--csv", tmp_path / "t.csv", "--latex", tmp_path / "t.tex"]
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    found = Comparison.load(out / "results")
    assert found.methods == ["my-run", "leave-one-out", "random"]
    assert found.settings["metrics"]["morf"]["settings"]["steps"] == 4
    assert found.settings["methods"]["leave-one-out"]["batch_size"] == 7
    assert len(found.examples) == 6
    assert [row.depth for row in found.table_rows] == [3, 0, 0]  # the masks of the input are read at depths 0 to 3
    assert re.search(r"my-run (costs less than leave-one-out from|never pays off against)", done.stdout)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert r"\toprule" in (tmp_path / "t.tex").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    again = run(*words)
    assert again.exit_code == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")} == before
    other = run(*words, "--seed", 3)
    assert other.exit_code == 2
    assert "holds another comparison" in other.stderr


def test_a_factory_brings_its_batches(run: Run, network: str, tmp_path: Path) -> None:
    words = ["compare", f"{network}:with_data", "--methods", "leave-one-out,random", "--site", "layer:output"]
    done = run(*words, "--out", tmp_path / "out", "--metrics", "comprehensiveness")
    assert done.exit_code == 0, done.stderr
    assert "8 examples at layer:output" in done.stdout
    assert json.loads((tmp_path / "out" / "results" / "comparison.json").read_text())["settings"]["seed"] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "leave-one-oot"], "neither the folder of a run nor the name of an explainer"),
        (["--methods", "leave-one-oot"], "Did you mean 'leave-one-out'"),
        (["--metrics", "sufficiensy"], "Did you mean 'sufficiency'"),
        (["--metrics", "auroc"], "'auroc' needs what each example needs"),
        (["--methods", "diffmask"], "diffmask must be fitted"),
        (["--methods", "random", "--set", "steps=3"], "--set steps names no method or metric"),
        (["--methods", "random", "--set", "morf.steps=3"], "morf, which is not compared. Name it in --metrics"),
        (["--methods", "random", "--set", "random.sed=3"], "no setting 'sed'. Did you mean 'seed'"),
        (["--limit", "3"], "--limit needs --data"),
        (["--sites", "layr:output"], "Did you mean 'layer:output'"),
    ],
)
def test_errors_are_one_line(run: Run, network: str, words: list[str], told: str, tmp_path: Path) -> None:
    done = run("compare", f"{network}:with_data", "--out", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_of_another_model(run: Run, network: str, bert: Path, texts: Path, tmp_path: Path) -> None:
    fitted = run("fit", f"{network}:with_data", "--out", tmp_path / "run", "--steps", 2)
    assert fitted.exit_code == 0, fitted.stderr
    done = run("compare", bert, "--data", texts, "--methods", tmp_path / "run", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "was saved for another model" in done.stderr
