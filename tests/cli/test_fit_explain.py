"""`maskhooks fit` and `maskhooks explain`, end to end: a transformer's folder, and a factory's network."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from maskhooks.data.records import Record
from maskhooks.explanations.explanation import Explanation
from maskhooks.model.source import Factory

Run = Callable[..., Result]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Twenty labelled texts."""
    path = tmp_path / "texts.csv"
    adjectives = {"good": "positive", "bad": "negative"}
    rows = [f"the film {'very ' * (i % 3)}{word},{name}" for i in range(10) for word, name in adjectives.items()]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def test_transformer_from_texts_to_page(run: Run, bert: Path, texts: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "explained"
    fitted = run("fit", bert, "--data", texts, "--validation", texts, "--out", folder, "--limit", 12, "--steps", 8)
    assert fitted.exit_code == 0, fitted.stderr
    assert len(re.findall(r"^ bert\.\S+:output .*%", fitted.stdout, re.MULTILINE)) == 3
    assert "within the margin of 0.1 nats" in fitted.stdout
    with (folder / "validation.csv").open() as file:
        assert len({row["site"] for row in csv.DictReader(file)}) == 4
    command = next(line for line in fitted.stdout.splitlines() if "maskhooks explain" in line)
    words = shlex.split(command)[1:]
    assert words[-2:] == ["--out", f"{folder}-explained"]

    explained = run(*words[:-1], out, "--limit", 6, "--max-examples", 2, "--plots", 1, "--batch-size", 4)
    assert explained.exit_code == 0, explained.stderr
    assert re.search(r"bert\.encoder\.layer\.1:output +3 +\d+\.\d%", explained.stdout)
    assert "over 6 examples" in explained.stdout
    explanation = Explanation.from_parquet(out / "explanation.parquet")
    assert sorted(set(explanation["example"].tolist())) == list(range(6))
    assert [about["target"] for about in explanation.metadata.values()] == ["positive", "negative"] * 3
    assert {about["prediction"] for about in explanation.metadata.values()} <= {
        "negative",
        "neutral",
        "positive",
    }
    assert explanation.select(example=0, depth=0)["label"].tolist() == [
        "[CLS]",
        "the",
        "film",
        "good",
        "[SEP]",
    ]
    page = (out / "explanation.html").read_text(encoding="utf-8")
    assert page.count('"number":') == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "example-0.png",
        "explanation.html",
        "explanation.parquet",
    ]


def test_factory_from_its_batches_to_page(run: Run, network: str, tmp_path: Path) -> None:
    fitted = run(
        "fit",
        f"{network}:with_data",
        "--out",
        "run",
        "--steps",
        6,
        "--sites",
        "layer:output",
        "--margin",
        0.5,
    )
    assert fitted.exit_code == 0, fitted.stderr
    saved = json.loads((tmp_path / "run" / "explainer.json").read_text())["settings"]
    assert [site["address"] for site in saved["sites"]] == ["layer:output"]
    assert saved["margin"] == 0.5
    explained = run("explain", "run", f"{network}:with_data", "--out", "explained")
    assert explained.exit_code == 0, explained.stderr
    explanation = Explanation.from_parquet(tmp_path / "explained" / "explanation.parquet")
    assert len(set(explanation["example"].tolist())) == 8  # its two validation batches
    assert explanation["label"][0].startswith("token ")


def test_an_explainer_that_learns_nothing_is_named(run: Run, network: str, tmp_path: Path) -> None:
    words = ("explain", "erasure", f"{network}:with_data", "--out", "erased", "--set", "sites=embed:output")
    explained = run(*words, "--set", "max_positions=8")
    assert explained.exit_code == 0, explained.stderr
    explanation = Explanation.from_parquet(tmp_path / "erased" / "explanation.parquet")
    assert set(explanation["score"].tolist()) <= {0.0, 1.0}
    assert all("positions: {" in about["search"] for about in explanation.metadata.values())
    assert explanation.provenance["max_positions"] == 8
    for wrong, said in {
        ("diffmask",): "call fit",
        ("erasure", "--set", "max_positions"): "--set max_positions=VALUE",
        ("erasre",): "neither the folder of a run nor the name of an explainer",
        ("erasre", "--units", "words"): "Did you mean 'erasure'?",
        ("erasure", "--set", "position=3"): "erasure has no setting 'position'.",
        ("erasure", "--set", "max_set=3"): "or 'max_sets'",
        ("random", "--set", "hooked=3"): "random has no setting 'hooked'",
        ("random", "--set", "sites=nowhere:output"): "no site",
    }.items():
        refused = run("explain", wrong[0], f"{network}:with_data", "--out", "refused", *wrong[1:])
        assert refused.exit_code == 2, refused.stderr
        assert said in " ".join(refused.stderr.split())


@pytest.mark.parametrize("name", ["attention", "rollout"])
def test_attention_is_explained_and_not_called_kept(
    run: Run, bert: Path, texts: Path, tmp_path: Path, name: str
) -> None:
    command = ("explain", name, bert, "--data", texts, "--out", tmp_path / name, "--set", "queries=1")
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert "attention" in done.stdout
    assert "kept" not in done.stdout
    rows = Explanation.from_parquet(tmp_path / name / "explanation.parquet")
    assert rows.provenance["explainer"] == name
    assert rows.provenance["queries"] == 1
    assert (tmp_path / name / "example-0.png").exists()
    refused = run(*command[:6], tmp_path / "none", "--set", "layer=9")
    assert refused.exit_code == 2
    assert "layer=9" in refused.stderr


def test_factory_without_validation(run: Run, network: str) -> None:
    fitted = run("fit", f"{network}:train_only", "--out", "run", "--steps", 4)
    assert fitted.exit_code == 0, fitted.stderr
    assert "on the training batches" in fitted.stdout
    assert "is not checked" in fitted.stdout


def test_options_reach_the_masks(run: Run, network: str, tmp_path: Path) -> None:
    fitted = run(
        *("fit", f"{network}:train_only", "--out", "run", "--steps", 4, "--seed", 3, "--recipe", "paper"),
        *("--sites", "embed:output", "--conditioned-on", "embed:output", "--conditioned-on", "layer:output"),
        *("--gate", "bernoulli", "--baseline", "zero"),
    )
    assert fitted.exit_code == 0, fitted.stderr
    saved = json.loads((tmp_path / "run" / "explainer.json").read_text())["settings"]
    assert [site["address"] for site in saved["conditioned_on"]] == ["embed:output", "layer:output"]
    assert (saved["gate"], saved["baseline"], saved["seed"]) == ("bernoulli", "zero", 3)
    assert saved["recipe"]["name"] == "paper"


def test_a_tenth_is_held_out_and_the_seed_decides(run: Run, network: str, tmp_path: Path) -> None:
    from maskhooks.cli.material import Material

    lines = [json.dumps({"text": f"{1 + i % 9} {1 + i % 4}", "label": i}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    seen: list[list[Record]] = []

    def batches(seed: int, limit: int | None = None) -> tuple[set[int], set[int], list[int]]:
        opened = Factory().open(f"{network}:of_texts")
        object.__setattr__(opened, "batch", lambda records: seen.append(list(records)) or [r.label for r in records])
        material = Material("of_texts", opened, seed=seed, batch_size=7)
        train, held = material.for_training(str(tmp_path / "data.jsonl"), None, limit)
        assert held is not None
        order = [label for batch in train for label in batch]
        return set(order), {label for batch in held for label in batch}, order

    train, held, order = batches(0)
    assert (len(train), len(held)) == (36, 4)
    assert not train & held
    assert batches(0)[2] == order
    assert batches(1)[1] != held
    train, held, _ = batches(0, limit=20)
    assert (len(train), len(held)) == (18, 2)


def test_same_seed_same_masks(run: Run, network: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\n" + "\n".join(f"{1 + i % 9} {1 + i % 4}" for i in range(30)))
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        torch.rand(3)
        fitted = run("fit", f"{network}:of_texts", "--data", "data.csv", "--out", name, "--steps", 6, "--batch-size", 8)
        assert fitted.exit_code == 0, fitted.stderr
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["of_texts"], "there is no data for .*of_texts. Give texts with --data"),
        (["bare"], "there is no data for .*bare. Make the factory return"),
        (["bare", "--data", "data.csv"], "does not say how texts become batches"),
        (["train_only", "--limit", "3"], "--limit needs --data"),
        (["train_only", "--validation", "data.csv"], "--validation needs --data"),
        (["of_texts", "--data", "one.csv"], "only one example, so none can be held out"),
        (["train_only", "--margin", "0"], "margin"),
        (["train_only", "--sites", "layr:output"], r"layr:output.* Did you mean 'layer:output'"),
        (["train_only", "--gate", "hard"], r"no gate is named 'hard'.*hard-concrete"),
        (["train_only", "--recipe", "stabel"], "no recipe is named 'stabel'"),
        (["train_only", "--baseline", "none"], "no baseline is named 'none'"),
    ],
)
def test_bad_settings_of_fit(run: Run, network: str, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "one.csv").write_text("text\n1 2\n")
    (tmp_path / "data.csv").write_text("text\n1 2\n3 4\n")
    result = run("fit", f"{network}:{words[0]}", *words[1:], "--out", "run", "--steps", 2)
    assert result.exit_code == 2, result.stdout
    assert re.search(message, result.stderr)
    assert result.stderr.count("\n") == 1


def test_out_that_is_taken(run: Run, network: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in (["fit", f"{network}:train_only"], ["explain", "run", f"{network}:train_only"], ["demo"]):
        result = run(*command, "--out", "file")
        assert result.exit_code == 2
        assert "file is not a writable folder" in result.stderr
    words = ("fit", f"{network}:train_only", "--out", "run", "--steps", 2)
    assert run(*words).exit_code == 0
    assert "run already holds trained masks" in run(*words).stderr
    assert run(*words, "--overwrite").exit_code == 0


def test_explain_what_is_no_run_or_anothers(run: Run, network: str, tmp_path: Path) -> None:
    result = run("explain", "nowhere", f"{network}:with_data", "--out", "explained")
    assert result.exit_code == 2
    assert "'nowhere' is neither the folder of a run nor the name of an explainer" in " ".join(result.stderr.split())
    (tmp_path / "empty").mkdir()
    result = run("explain", "empty", f"{network}:with_data", "--out", "explained")
    assert result.exit_code == 2
    assert "explainer.json cannot be read" in result.stderr
    assert run("fit", f"{network}:train_only", "--out", "run", "--steps", 2).exit_code == 0
    source = tmp_path / "tiny_network.py"
    (tmp_path / "other_network.py").write_text(source.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    other = run("explain", "run", "other_network:with_data", "--out", "explained")
    assert other.exit_code == 2
    assert "was saved for another model" in other.stderr


def started(folder: Path, *words: object) -> subprocess.Popen[str]:
    """`maskhooks fit` on the factory's network, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "maskhooks", "fit", "tiny_network:with_data", "--out", str(folder), *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_of(folder: Path) -> int:
    return len((folder / "log.csv").read_text().splitlines()) if (folder / "log.csv").exists() else 0


def test_ctrl_c_and_kill_and_resume(run: Run, network: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        before = rows_of(folder)
        process = started(folder, "--steps", 5000, *(["--resume"] if before else []))
        while rows_of(folder) < before + 20 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        if code > 0:
            line = next(line for line in stderr.splitlines() if line.startswith("stopped:"))
            assert re.search(rf"interrupted at step \d+\. .* are in {folder}\. Continue with .* --resume\.", line)
    again = run("fit", f"{network}:with_data", "--out", folder, "--steps", 5000)
    assert again.exit_code == 2
    assert "already holds trained masks" in again.stderr
    (folder / "explainer.json").unlink()
    again = run("fit", f"{network}:with_data", "--out", folder, "--steps", 5000)
    assert again.exit_code == 2
    assert "holds an unfinished run. Continue it with --resume" in again.stderr
    again = run("fit", f"{network}:with_data", "--out", folder, "--steps", 100, "--resume")
    assert again.exit_code == 2
    assert "steps was 5000 and is 100" in again.stderr


def test_resume_ends_as_if_nothing_had_happened(run: Run, network: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    whole = run("fit", f"{network}:with_data", "--out", one, "--steps", 60)
    process = started(two, "--steps", 60)
    while rows_of(two) < 20 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = run("fit", f"{network}:with_data", "--out", two, "--steps", 60, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.stdout.replace(str(two), str(one)) == whole.stdout
    for name in ("log.csv", "validation.csv", "weights.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    finished = run("fit", f"{network}:with_data", "--out", two, "--steps", 60, "--resume")
    assert finished.stdout == resumed.stdout


def test_trained_masks_without_their_run_are_not_begun_again(run: Run, network: str, tmp_path: Path) -> None:
    (tmp_path / "explainer.json").touch()
    refused = run("fit", f"{network}:with_data", "--out", tmp_path, "--resume")
    assert refused.exit_code == 2
    assert "already holds trained masks" in refused.stderr


def test_precision(run: Run, network: str, tmp_path: Path) -> None:
    words = ["fit", f"{network}:with_data", "--out", tmp_path / "run", "--steps", 4, "--precision"]
    assert run(*words, "bf16-mixed").exit_code == 0
    refused = run(*words, "bf16-true", "--overwrite")
    assert refused.exit_code == 2
    assert "would rewrite the model's weights" in refused.stderr
