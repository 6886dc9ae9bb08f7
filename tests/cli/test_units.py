"""`--units`: pieces of a word gated together, in `fit` and in `explain` alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import maskhooks
from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.model.source import SOURCES, choose
from maskhooks.plugins.registry import registry

Run = Callable[..., Result]


@pytest.fixture
def pieces(bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT, with a piece of a word among its tokens."""
    folder = tmp_path / "pieces"
    shutil.copytree(bert, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"very"', '"##very"'), encoding="utf-8")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "the film good ##very ##very bad\nbad film ##very\n" * 4, encoding="utf-8")
    return path


def scores(out: Path) -> list[list[float]]:
    """The scores of the first text's tokens, site by site."""
    rows = Explanation.from_parquet(out / "explanation.parquet").select(example=0)
    sites = sorted({(str(site), int(depth)) for site, depth in zip(rows["site"], rows["depth"], strict=True)})
    return [rows["score"][(rows["site"] == site) & (rows["depth"] == depth)].tolist() for site, depth in sites]


def test_masks_are_explained_with_the_units_they_were_trained_with(
    run: Run, pieces: Path, texts: Path, tmp_path: Path
) -> None:
    words, tokens = tmp_path / "words", tmp_path / "tokens"
    for folder, given in ((words, ("--units", "words")), (tokens, ())):
        fitted = run("fit", pieces, "--data", texts, "--validation", texts, "--out", folder, "--steps", 4, *given)
        assert fitted.exit_code == 0, fitted.stderr
        done = run("explain", folder, pieces, "--data", texts, "--out", f"{folder}-out", "--plots", 0)
        assert done.exit_code == 0, done.stderr
    assert all(len(set(one[3:6])) == 1 and len(set(one)) > 1 for one in scores(tmp_path / "words-out"))
    assert all(len(set(one[3:6])) > 1 for one in scores(tmp_path / "tokens-out"))
    assert json.loads((words / "explainer.json").read_text())["settings"]["units"] == "words"

    other = run("explain", tokens, pieces, "--data", texts, "--out", tmp_path / "other", "--units", "words")
    assert other.exit_code == 2
    told = " ".join(other.stderr.split())
    assert "was trained with each position by itself, but the model is wrapped with units='words'" in told
    hooked = choose(str(pieces), registry.parts(SOURCES)).open(str(pieces)).hooked
    assert maskhooks.load(words, hooked.model).hooked.task.unit_name == "words"
    with pytest.raises(SettingError, match="trained with units='words', but the model is wrapped with each position"):
        maskhooks.load(words, hooked)
    again = run("fit", pieces, "--data", texts, "--validation", texts, "--out", words, "--steps", 4, "--resume")
    assert again.exit_code == 2
    assert "units" in again.stderr


def test_named_explainers_take_units_too(run: Run, pieces: Path, texts: Path, tmp_path: Path) -> None:
    command = ("explain", "random", pieces, "--data", texts, "--out", tmp_path / "out", "--plots", 0)
    command += ("--set", "sites=input")
    assert run(*command, "--units", "words").exit_code == 0
    (one,) = scores(tmp_path / "out")
    assert len(set(one[3:6])) == 1
    other = run(*command)
    assert other.exit_code == 2
    assert "units" in other.stderr


def test_units_that_nothing_knows(run: Run, pieces: Path, texts: Path, network: str, tmp_path: Path) -> None:
    refused = run("fit", pieces, "--data", texts, "--out", tmp_path / "run", "--units", "sentences")
    assert refused.exit_code == 2
    assert "units='sentences' is not known. Give 'words', or a function of the batch" in " ".join(
        refused.stderr.split()
    )
    refused = run("explain", "random", f"{network}:with_data", "--out", tmp_path / "out", "--units", "words")
    assert refused.exit_code == 2
    assert "does not know which positions these are" in " ".join(refused.stderr.split())
