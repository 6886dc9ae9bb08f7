"""`maskhooks sites` and `maskhooks doctor`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


def test_sites_of_a_folder(run: Run, bert: Path) -> None:
    result = run("sites", bert)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"bert\.embeddings\.word_embeddings:output +batch token hidden", result.stdout)
    assert "shape" not in result.stdout


def test_sites_with_shapes(run: Run, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("sentence\ngood film\nbad\n")
    result = run("sites", bert, "--data", tmp_path / "data.csv", "--text-column", "sentence")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"bert\.encoder\.layer\.1:output .* hidden +3 +\[2, 4, 8\]", result.stdout)


def test_sites_of_a_factory(run: Run, network: str) -> None:
    assert "shape" not in run("sites", f"{network}:bare").stdout
    with_data = run("sites", f"{network}:with_data")
    assert re.search(r"layer:output +.* +1 +\[4, 5, 4\]", with_data.stdout)


def test_no_sites(run: Run, network: str) -> None:
    result = run("sites", f"{network}:module")
    assert result.exit_code == 0
    assert "No plugin knows the modules of this Network" in result.stdout


@pytest.mark.parametrize("command", ["sites", "doctor"])
def test_data_for_a_model_that_takes_none(run: Run, network: str, command: str) -> None:
    result = run(command, f"{network}:bare", "--data", "data.csv")
    assert result.exit_code == 2
    assert "does not say how texts become batches" in result.stderr


def test_batches_that_are_none(run: Run, network: str) -> None:
    result = run("sites", f"{network}:no_batch")
    assert result.exit_code == 2
    assert "no_batch yield no batch" in result.stderr


def test_doctor_of_a_healthy_model(run: Run, bert: Path) -> None:
    result = run("doctor", bert)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert re.search(r"bert\.encoder\.layer\.0:output +1 +\[2, \d+, 8\] +float32 +cpu +no", result.stdout)
    assert "output: Categorical over batch [2]" in result.stdout
    assert "8 sites, all well" in result.stdout  # 4 hidden states, 2 layers with heads and an MLP each


@pytest.mark.parametrize(
    ("factory", "found"),
    [("never_fires", r"past:output +0 .*never fire"), ("bypassed", r"layer:output +1 .*BYPASSED")],
)
def test_doctor_of_a_model_in_trouble(run: Run, network: str, factory: str, found: str) -> None:
    result = run("doctor", f"{network}:{factory}")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert re.search(found, result.stdout)
    assert "cannot be masked as it is" in result.stdout


def test_doctor_without_a_batch(run: Run, network: str) -> None:
    result = run("doctor", f"{network}:bare")
    assert result.exit_code == 2
    assert "there is no batch to run tiny_network:bare with" in result.stderr


def test_unknown_device(run: Run, bert: Path) -> None:
    for name in ("gpu", "cuda:99"):
        result = run("sites", bert, "--device", name)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: the device '{name}' cannot be used here")
