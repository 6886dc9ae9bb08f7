"""`maskhooks demo` with few examples and steps; what the figures are in full is for benchmarks/digits.py."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from maskhooks.cli import demo as command
from maskhooks.explanations.explanation import Explanation
from maskhooks.toy_tasks import digits
from maskhooks.training.recipe import Recipe

Run = Callable[..., Result]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = digits.generate
    short = {name: dataclasses.replace(s, steps=10) for name, s in digits.SETTINGS.items()}
    monkeypatch.setattr(digits, "SETTINGS", short)
    monkeypatch.setattr(digits, "generate", lambda: generate(400))
    monkeypatch.setattr(command, "_EPOCHS", 2)
    quick = Recipe(baseline_steps=5, validations=1)
    monkeypatch.setattr(Recipe, "named", classmethod(lambda cls, name: quick))


@pytest.mark.usefixtures("small")
def test_demo(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--seed", 1)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"The network is right on \d+\.\d% of 40 new examples", result.stdout)
    methods = re.findall(r"^ (\S.*?)  +(?:\d\.\d{4}|inf) +\d\.\d{4} *$", result.stdout, re.MULTILINE)
    ours = [f"DiffMask, {name}" for name in digits.SETTINGS]
    assert methods == [*ours, "random scores", "erasure of one token"]
    names = ["bars.png", "explanation.html", "explanation.parquet", "heatmap.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(str(out / name) in result.stdout for name in names)
    explanation = Explanation.from_parquet(out / "explanation.parquet")
    assert len(set(explanation["example"].tolist())) == 40
    assert re.fullmatch(r"more \d than \d\?", explanation.metadata[0]["question"])


def test_conclusion_says_when_it_did_not_work() -> None:
    far = {"DiffMask, hidden state": 0.7, "random scores": 0.9, "erasure of one token": float("inf")}
    assert command._learned(far).startswith("This time the masks did not find")
    assert command._learned({**far, "DiffMask, hidden state": 0.01}).startswith("The masks found")
