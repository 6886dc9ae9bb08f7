"""The encoders that benchmarks share: made once, whole or not at all, with files that the command line reads."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maskhooks.data.records import read

transformers = pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATA = Path(os.environ.get("MASKHOOKS_DATA", Path(__file__).parents[2] / "shared"))
TOPICS = ["rain", "goal", "shares", "chip"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *TOPICS, "the", "is", "no"]
RELATIONS = ["entailment", "neutral", "contradiction"]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of MASKHOOKS_DATA, with tiny models and a few examples."""
    home = tmp_path_factory.mktemp("home")
    for name in ("sst", "ag_news", "mnli"):
        (home / "data" / name).mkdir(parents=True)
    for name in ("train", "dev"):
        trees = [f"({label} ({label} {word}) (2 rain))" for label, word in ((4, "good"), (0, "bad"))]
        (home / "data" / "sst" / f"{name}.txt").write_text("\n".join(trees), encoding="utf-8")
    for name, apart in (("train_subset", False), ("test", True)):
        texts = [["the", f"{word} is, \n{word}"] for word in TOPICS * 10]
        with gzip.open(home / "data" / "ag_news" / f"{name}.csv.gz", "wt", encoding="utf-8", newline="") as file:
            rows = ([number % 4 + 1, *(text if apart else [" ".join(text)])] for number, text in enumerate(texts))
            csv.writer(file).writerows(rows)
    pairs = [f'{number}\tthe "rain\tis no rain\t{RELATIONS[number % 3]}\t50' for number in range(30)]
    with gzip.open(home / "data" / "mnli" / "mnli_dev_matched_with_bert_correct.tsv.gz", "wt", newline="") as file:
        file.write("\n".join(["index\tpremise\thypothesis\tgold_label\tcorrect", *pairs, ""]))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=128, num_labels=5, **sizes)
    for name in ("minilm-sst5", "minilm-squad"):
        folder = home / "models" / name
        torch.manual_seed(0)
        kind = (
            transformers.BertForSequenceClassification if name.endswith("5") else transformers.BertForQuestionAnswering
        )
        kind(config).half().save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return home


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> Any:
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASKHOOKS_DATA": str(home)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASKHOOKS_CACHE", str(tmp_path / "kept"))
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("encoders")


@pytest.fixture
def run(encoders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command and returns what it prints."""

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["encoders.py", *arguments])
        encoders.main()
        figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    return run


def test_each_encoder_is_made_with_files_that_are_read(encoders: Any, run: Run, home: Path, tmp_path: Path) -> None:
    figures = run("--prepare")
    assert figures["folder"] == str(tmp_path / "kept")
    for name, counts in {"sst": (2, 2), "ag_news": (40, 40), "mnli": (24, 6)}.items():
        found = encoders.encoder(name)
        records = [read(str(path), found.columns) for path in (found.train, found.held_out)]
        assert tuple(map(len, records)) == counts == (found.about["train"], found.about["held_out"])
        assert found.folder == tmp_path / "kept" / name
        assert figures[name]["made"]
        assert figures[name]["accuracy"] == found.about["accuracy"]

        model, tokenizer = found.model(), found.tokenizer()
        assert [model.config.id2label[number] for number in range(model.config.num_labels)] == found.about["labels"]
        pairs = [one.text_pair for one in records[1]] if name == "mnli" else None
        batch = tokenizer([one.text for one in records[1]], pairs, padding=True, return_tensors="pt")
        hits = model(**batch).logits.argmax(-1) == torch.tensor([one.label for one in records[1]])
        assert hits.float().mean().item() == pytest.approx(found.about["accuracy"])
    assert read(str(encoders.encoder("ag_news").held_out))[2].text == "the shares is, \nshares"
    assert read(str(encoders.encoder("ag_news").held_out))[2].label == 2


def test_that_of_sst_is_the_given_model(encoders: Any, run: Run, home: Path) -> None:
    run("--prepare", "--only", "sst")
    given = transformers.AutoModelForSequenceClassification.from_pretrained(
        home / "models" / "minilm-sst5", dtype=torch.float32
    )
    kept = encoders.encoder("sst").model().state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in given.state_dict().items())


def test_the_pairs_are_split_by_their_seed(encoders: Any, home: Path) -> None:
    (train, held), again, other = (encoders.TASKS["mnli"].read(home / "data", seed) for seed in (0, 0, 1))
    assert (train, held) == again
    assert [row["id"] for row in held] != [row["id"] for row in other[1]]
    assert sorted(row["id"] for row in train + held) == list(range(30))
    assert train[0]["text"] == 'the "rain'
    assert all(row["label"] == [0, 1, 2][row["id"] % 3] for row in train + held)


def test_nothing_is_made_twice(run: Run, tmp_path: Path) -> None:
    assert run("--only", "ag_news")["ag_news"] is None
    made = run("--prepare", "--only", "ag_news")["ag_news"]
    before = (tmp_path / "kept" / "ag_news" / "about.json").stat().st_mtime_ns
    assert run("--prepare", "--only", "ag_news")["ag_news"] == {**made, "made": False}
    assert run("--only", "ag_news")["ag_news"] == {**made, "made": False}
    assert (tmp_path / "kept" / "ag_news" / "about.json").stat().st_mtime_ns == before


def missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")


def unreadable(folder: Path) -> None:
    (folder / "about.json").write_text("{", encoding="utf-8")


def made_otherwise(folder: Path) -> None:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    about["settings"]["rate"] = 1.0
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


@pytest.mark.parametrize("harm", [missing, truncated, unreadable, made_otherwise])
def test_what_is_half_there_is_refused_and_made_again(
    encoders: Any, run: Run, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    run("--prepare", "--only", "sst")
    harm(tmp_path / "kept" / "sst")
    with pytest.raises(SystemExit, match=r"python benchmarks/encoders\.py --prepare --only sst$"):
        encoders.encoder("sst")
    assert run("--prepare", "--only", "sst")["sst"]["made"]
    assert encoders.encoder("sst").model().config.num_labels == 5
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["sst"]


def test_a_failure_leaves_the_former_encoder(
    encoders: Any, run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--prepare", "--only", "sst")
    before = encoders.encoder("sst")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        encoders.make("sst", tmp_path / "kept", encoders.TASKS["sst"].settings, home)
    assert encoders.encoder("sst") == before
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["sst"]


def test_missing_data_are_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKHOOKS_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"mnli needs .*minilm-.*MASKHOOKS_DATA"):
        run("--prepare", "--only", "mnli")


def test_tuning_sees_no_held_out_example(encoders: Any, run: Run, home: Path, tmp_path: Path) -> None:
    path = home / "data" / "ag_news" / "test.csv.gz"
    kept = path.read_bytes()
    path.write_bytes(gzip.compress(b""))
    try:
        figures = run("--tune", "--only", "ag_news", "--settings", '{"rate": 0.01, "epochs": 2}')["ag_news"]
    finally:
        path.write_bytes(kept)
    assert figures["settings"]["rate"] == 0.01
    assert 0 <= figures["accuracy"] <= 1
    assert not (tmp_path / "kept").exists()


@pytest.mark.skipif(
    not (DATA / "models" / "minilm-squad").exists() or not (DATA / "data" / "mnli").exists(),
    reason=f"no models/minilm-squad or data/mnli in {DATA} (MASKHOOKS_DATA)",
)
def test_a_few_batches_of_the_real_data() -> None:
    words = [sys.executable, str(BENCHMARKS / "encoders.py"), "--quick", "--only", "mnli"]
    environment = {**os.environ, "MASKHOOKS_DATA": str(DATA)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["mnli"]["train"], figures["mnli"]["held_out"]) == (64, 128)
    assert 0.1 < figures["mnli"]["accuracy"] < 0.8
    assert not Path(figures["folder"]).exists()
