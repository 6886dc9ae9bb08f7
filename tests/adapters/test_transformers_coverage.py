"""The benchmark of model types: a dozen of them pass, and results of several runs make one table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
KINDS = ["input", "hidden", "head", "mlp"]


def run(*arguments: str | Path) -> dict[str, Any]:
    """The figures that the benchmark prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def rows_of(page: Path) -> list[str]:
    lines = page.read_text().splitlines()
    return lines[lines.index(f"|{'---|' * 8}") + 1 :]


def test_a_dozen_types_pass_all_checks(tmp_path: Path) -> None:
    figures = run("--quick", "--save", tmp_path / "saved.json", "--matrix", tmp_path / "matrix.md")
    tasks = {name: part for name, part in figures.items() if isinstance(part, dict)}
    assert len(tasks) == 8
    for task, part in tasks.items():
        assert part["ok"] == part["total"] >= 1, (task, part["failures"])
        assert (part["failures"], part["not_buildable"]) == ({}, {})
        assert part["kinds"]["input"] == part["kinds"]["hidden"] == part["total"]
        assert part["softmax_attention"]["without"] == []
    assert tasks["seq2seq-lm"]["bypassed"] == ["bart"]
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert {task: len(of_task) for task, of_task in saved.items()} == {t: part["total"] for t, part in tasks.items()}
    rows = rows_of(tmp_path / "matrix.md")
    assert len(rows) == len({kind for of_task in saved.values() for kind in of_task})
    assert all(row.endswith("| yes |") for row in rows)


def test_saved_results_are_merged_and_the_later_ones_count(tmp_path: Path) -> None:
    good = {"ok": True, "kinds": KINDS, "bypassed": [], "attends": True}
    bad = {"ok": False, "kinds": KINDS[:2], "bypassed": ["a:output"], "attends": True, "reason": "took over 60 s"}
    plain = {"ok": True, "kinds": KINDS[:2], "bypassed": [], "attends": False}
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"masked-lm": {"bert": bad, "xmod": {"not_buildable": "no language"}, "mra": bad}}))
    second.write_text(json.dumps({"masked-lm": {"bert": good}, "causal-lm": {"mamba": plain, "bert": good}}))
    figures = run("--from", first, second, "--matrix", tmp_path / "matrix.md")
    assert figures["causal-lm"]["ok"] == 2
    part = figures["masked-lm"]
    assert (part["ok"], part["total"], part["failures"]) == (1, 2, {"mra": "took over 60 s"})
    assert part["not_buildable"] == {"xmod": "no language"}
    assert part["softmax_attention"] == {"total": 2, "head": 1, "without": ["mra"]}
    assert rows_of(tmp_path / "matrix.md") == [
        "| bert | 2 | yes | yes | yes | yes | no | yes |",
        "| mamba | 1 | yes | yes | no attention | no | no | yes |",
        "| mra | 1 | yes | yes | no | no | yes | no |",
    ]
