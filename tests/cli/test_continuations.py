"""Prompts and continuations on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from maskhooks_transformers.source import TransformersSource
from typer.testing import Result

from maskhooks import Explanation
from maskhooks.data.records import Record
from maskhooks.errors import BatchError


@pytest.fixture
def writer(gpt2: Path, tmp_path: Path) -> Path:
    """A folder with a GPT-2 that writes, and its tokenizer."""
    import transformers

    folder = tmp_path / "writer"
    config = transformers.AutoConfig.from_pretrained(gpt2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gpt2).save_pretrained(folder)
    return folder


def test_second_texts_continue_the_first(writer: Path) -> None:
    opened = TransformersSource().open(str(writer), max_length=6)
    assert opened.batch is not None
    batch = opened.batch([Record("a very good", text_pair=" film"), Record("the", text_pair="film .")])
    task = opened.hooked.task
    assert task.targets(batch) == ["film", "film ."]
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 2]
    assert "labels" not in opened.batch([Record("a very good"), Record("the")])
    long = opened.batch([Record(" ".join(["film"] * 20) + " it", text_pair="good")])
    names = task.names(opened.hooked.sites[0], long)[0]
    assert len(names) == 6
    assert names[-2:] == ["it", "good"]
    with pytest.raises(BatchError, match="continuation 0 is empty"):
        opened.batch([Record("a", text_pair="")])


def test_fit_and_explain(writer: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    rows = [{"prompt": "a very good", "next": " film"}, {"prompt": "the bad", "next": " film ."}] * 3
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    columns = ["--data", data, "--text-column", "prompt", "--second-column", "next"]
    fitted = run("fit", writer, *columns, "--sites", "input", "--steps", 2, "--out", tmp_path / "run")
    assert fitted.exit_code == 0, fitted.output
    explained = run("explain", tmp_path / "run", writer, *columns, "--out", tmp_path / "explained")
    assert explained.exit_code == 0, explained.output
    explanation = Explanation.from_parquet(tmp_path / "explained" / "explanation.parquet")
    assert explanation.metadata[0]["target"].split() == ["film"]
    kept = explanation.select(example=0, depth=0)["label"].tolist()
    assert "film" not in kept
    assert {"a", "very", "good"} <= set(kept)
