"""`maskhooks fit --tensorboard`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.runs.test_tensorboard import scalars

Run = Callable[..., Result]


def test_the_logs_are_written_for_tensorboard(run: Run, network: str) -> None:
    pytest.importorskip("tensorboard")
    fitted = run("fit", f"{network}:with_data", "--out", "run", "--steps", 6, "--tensorboard")
    assert fitted.exit_code == 0, fitted.stderr
    train, validation = (scalars(Path("run/tensorboard") / name) for name in ("train", "validation"))
    steps = [step for site in ("embed", "layer") for step, _ in train.get(f"{site}:output/divergence", [])]
    assert sorted(set(steps)) == list(range(6))
    assert validation["layer:output/agreement"][-1][0] == 6


def test_without_tensorboard_the_way_to_it_is_told(run: Run, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fitted = run("fit", f"{network}:train_only", "--out", "run", "--steps", 2, "--tensorboard")
    assert fitted.exit_code != 0
    assert "pip install 'maskhooks[tensorboard]'" in " ".join((fitted.stderr + fitted.stdout).split())
