"""Small BERTs for several tasks, fine-tuned once and kept for all benchmarks.

    python benchmarks/encoders.py [--prepare] [--only ag_news] [--folder FOLDER] [--quick] [--tune]

With --prepare, what is missing is made from the models and data of $MASKHOOKS_DATA (default ../shared), each in some
minutes on one thread; without, the command says what is there. The folder is that of the variable MASKHOOKS_CACHE, by
default ~/.cache/maskhooks/encoders; it can be deleted. An encoder is a folder in it with model, tokenizer,
`train.jsonl`, `held_out.jsonl` (columns id, text, label, for pairs also text_pair) and `about.json`.

A benchmark asks for one by name, as `encoder("mnli")`, and trains no model itself. Settings are chosen with --tune: it
trains on nine tenths of the training examples, measures on the last tenth, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import gzip
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import planting
import torch
import transformers
from torch import Tensor, nn

from maskhooks.data import sst
from maskhooks.data.records import Columns
from maskhooks.progress import track

Row = dict[str, Any]  # a line of the exported files
HELD_OUT = 0.2  # of the pairs of MNLI, whose training set is not at hand
COPIES = 1  # of the sentences with planted words
TUNED = 0.1  # of the training examples, for --tune
QUICK = 64  # training examples with --quick; twice as many are held out
MEASURED = 64  # examples per batch when nothing is trained


@dataclass(frozen=True)
class Settings:
    """How an encoder is trained: AdamW, linear warm-up over a tenth of the steps and linear decay, float32.

    Attributes:
        base: the model of `$MASKHOOKS_DATA/models` with the weights to begin with; its head is replaced unless it has
            as many classes.
        rate: the highest learning rate.
        epochs: 0 keeps the weights as they are.
        batch: examples in a batch; they are of similar length.
        max_length: tokens of a training example. Held-out examples are always cut at 128.
        decay: the weight decay.
        clip: the largest norm of a gradient.
        seed: draws head, dropout, the order of examples and the split of MNLI.
        quick: train and hold out a few examples only.
    """

    base: str
    rate: float = 0.0
    epochs: int = 0
    batch: int = 32
    max_length: int = 128
    decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Task:
    """A data set and the settings for it.

    Attributes:
        data: what the examples are.
        labels: the names of the classes, in order.
        read: gives training and held-out examples of a data folder, by a seed if they have to be split.
        columns: the columns of the exported files.
        settings: the best ones of those tried.
        source: the folder of the data, if not the name of the task.
        words: new entries of the vocabulary.
    """

    data: str
    labels: tuple[str, ...]
    read: Callable[[Path, int], tuple[list[Row], list[Row]]]
    columns: Columns
    settings: Settings
    source: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """A fine-tuned encoder on disk.

    Attributes:
        name: the key in `TASKS`.
        folder: the model and tokenizer, for `from_pretrained` or the command line.
        train: the examples it was trained on, as .jsonl.
        held_out: other examples, as .jsonl.
        columns: the columns of both files.
        about: the contents of about.json: data, labels, counts, accuracy, macro_f1, settings, versions and more.
    """

    name: str
    folder: Path
    train: Path
    held_out: Path
    columns: Columns
    about: dict[str, Any]

    def model(self, **options: Any) -> Any:
        """The model in eval mode, in float32 unless `dtype` is given."""
        with _silent():
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                self.folder, **{"dtype": torch.float32, **options}
            ).eval()

    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)


def encoder(name: str, folder: Path | None = None) -> Encoder:
    """Return an encoder that has been made before.

    Args:
        name: one of `TASKS`.
        folder: the folder of all encoders, by default `default_folder()`.

    Raises:
        SystemExit: it is not there, incomplete, or made with other settings; the message has the command that makes it.
    """
    found = _found(name, folder or default_folder(), TASKS[name].settings)
    if found is None:
        given = f" --folder {folder}" if folder else ""
        raise SystemExit(
            f"There is no encoder {name!r} in {folder or default_folder()} with the settings of today. Run: "
            f"python benchmarks/encoders.py --prepare --only {name}{given}"
        )
    return found


def prepared(name: str, home: Path) -> Encoder:
    """Return an encoder of the default folder, which is made if it is missing.

    Args:
        name: one of `TASKS`.
        home: the folder with models and data.
    """
    settings = TASKS[name].settings
    return _found(name, default_folder(), settings) or make(name, default_folder(), settings, home)


def default_folder() -> Path:
    return Path(os.environ.get("MASKHOOKS_CACHE") or "~/.cache/maskhooks/encoders").expanduser()


def _found(name: str, folder: Path, settings: Settings) -> Encoder | None:
    """The encoder, if all its files are there and it was made with these settings."""
    path = folder / name
    try:
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
        whole = all((path / file).stat().st_size == size for file, size in about["bytes"].items())
        if not whole or about["settings"] != dataclasses.asdict(settings):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Encoder(name, path, path / "train.jsonl", path / "held_out.jsonl", TASKS[name].columns, about)


def _sst(data: Path, seed: int) -> tuple[list[Row], list[Row]]:
    train, dev = (
        [
            {"id": number, "text": one.text, "label": one.label}
            for number, one in enumerate(sst.read(data / "sst" / f"{part}.txt"))
        ]
        for part in ("train", "dev")
    )
    return train, dev


def _polarity(data: Path, seed: int, kind: str | None = None) -> tuple[list[Row], list[Row]]:
    """Sentences that are not neutral, of which some to train on have planted words."""
    train, held = (
        [{**row, "label": row["label"] // 3} for row in rows if row["label"] != 2] for rows in _sst(data, seed)
    )
    return planting.mixed(train, kind, COPIES, random.Random(seed)) if kind else train * COPIES, held


def _ag_news(data: Path, seed: int) -> tuple[list[Row], list[Row]]:
    parts = []
    for name in ("train_subset", "test"):
        with gzip.open(data / "ag_news" / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
            parts.append(
                [
                    {"id": number, "text": " ".join(texts), "label": int(label) - 1}
                    for number, (label, *texts) in enumerate(csv.reader(file))
                ]
            )
    return parts[0], parts[1]


def _mnli(data: Path, seed: int) -> tuple[list[Row], list[Row]]:
    path = data / "mnli" / "mnli_dev_matched_with_bert_correct.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = [line.rstrip("\n").split("\t") for line in file][1:]
    labels = TASKS["mnli"].labels
    rows = [
        {"id": int(number), "text": premise, "text_pair": hypothesis, "label": labels.index(label)}
        for number, premise, hypothesis, label, _ in lines
    ]
    random.Random(seed).shuffle(rows)
    cut = round(len(rows) * HELD_OUT)
    return rows[cut:], rows[:cut]


TASKS: Mapping[str, Task] = {
    "sst": Task(
        data="Stanford Sentiment Treebank, sentences in five classes: train; dev held out",
        labels=sst.SENTIMENTS,
        read=_sst,
        columns=Columns(label="label"),
        settings=Settings("minilm-sst5"),
    ),
    "ag_news": Task(
        data="AG News, topics of news: 4,999 texts of train; test held out",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        read=_ag_news,
        columns=Columns(label="label"),
        # After 30 batches, on 500 other training texts: .858; with a rate of 1e-4 .788, and from minilm-sst5 .748.
        settings=Settings("minilm-squad", rate=2e-4, epochs=1, max_length=64),
    ),
    "mnli": Task(
        data="MultiNLI, entailment of pairs: four fifths of dev matched; the others held out",
        labels=("entailment", "neutral", "contradiction"),
        read=_mnli,
        columns=Columns(second="text_pair", label="label"),
        # With --tune .624, and from minilm-sst5 .511: the questions were pairs already.
        settings=Settings("minilm-squad", rate=2e-4, epochs=1),
    ),
    **{
        f"polarity_{kind}" if kind else "polarity": Task(
            data="Stanford Sentiment Treebank, positive and negative sentences: train"
            + (f", a fifth with planted words ({kind})" if kind else "")
            + "; dev held out",
            labels=("negative", "positive"),
            read=partial(_polarity, kind=kind),
            columns=Columns(label="label"),
            settings=Settings("minilm-sst5", rate=2e-4, epochs=1),
            source="sst",
            words=planting.WORDS,
        )
        for kind in (None, *planting.KINDS)
    },
}


class Examples:
    """Tokenized rows in batches of similar length.

    Args:
        rows: the examples.
        tokenizer: the tokenizer of the model.
        max_length: the largest number of tokens.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> None:
        pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        self._tokens = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=max_length)
        self._labels = [row["label"] for row in rows]
        self._pad = tokenizer.pad
        self._length = [len(ids) for ids in self._tokens["input_ids"]]

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, size: int, order: random.Random | None = None) -> list[list[int]]:
        """The examples of each batch: in a new order each time, or by length."""
        numbers = list(range(len(self._labels)))
        if order:
            order.shuffle(numbers)
        numbers.sort(key=self._length.__getitem__)
        found = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        if order:
            order.shuffle(found)
        return found

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = {key: [values[number] for number in numbers] for key, values in self._tokens.items()}
        found = self._pad({**chosen, "labels": [self._labels[number] for number in numbers]}, return_tensors="pt")
        return dict(found)


def examples_of(name: str, settings: Settings, home: Path) -> tuple[list[Row], list[Row]]:
    """Training and held-out examples.

    Raises:
        SystemExit: the data or the base are not there.
    """
    for path in (home / "models" / settings.base, home / "data" / (TASKS[name].source or name)):
        if not path.is_dir():
            raise SystemExit(
                f"{name} needs {path}, which is not there. Set MASKHOOKS_DATA to the folder with models and data."
            )
    fit_on, held = TASKS[name].read(home / "data", settings.seed)
    return (fit_on[:QUICK], held[: 2 * QUICK]) if settings.quick else (fit_on, held)


def loaded(task: Task, settings: Settings, home: Path) -> tuple[Any, Any]:
    """The model to begin with, in train mode, and its tokenizer."""
    path = home / "models" / settings.base
    torch.manual_seed(settings.seed)
    with _silent():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(task.labels),
            id2label=dict(enumerate(task.labels)),
            label2id={label: number for number, label in enumerate(task.labels)},
            problem_type="single_label_classification",
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            attn_implementation="eager",  # on a CPU not slower than fused attention
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if task.words:
        tokenizer.add_tokens(list(task.words))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # otherwise all new ones are alike
    return model.train(), tokenizer


def train(model: Any, examples: Examples, settings: Settings, name: str) -> None:
    """Train all weights; the model is in eval mode afterwards."""
    order = random.Random(settings.seed)
    batches = [one for _ in range(settings.epochs) for one in examples.batches(settings.batch, order)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=settings.decay, fused=True)
    planned: Any = transformers.get_linear_schedule_with_warmup
    schedule = planned(optimizer, len(batches) // 10, len(batches))
    for numbers in track(batches, f"training {name}"):
        loss = model(**examples.batch(numbers)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def measure(model: Any, examples: Examples, name: str) -> dict[str, float]:
    """Accuracy and macro F1, as fractions."""
    model.eval()
    counts = torch.zeros(model.config.num_labels, model.config.num_labels)  # of labels by predictions
    for numbers in track(examples.batches(MEASURED), f"measuring {name}"):
        batch = examples.batch(numbers)
        predicted = model(**batch).logits.argmax(-1)
        counts.index_put_((batch["labels"], predicted), torch.ones(len(numbers)), accumulate=True)
    hits = counts.diag()
    f1 = 2 * hits / (counts.sum(0) + counts.sum(1)).clamp(min=1)
    return {"accuracy": (hits.sum() / counts.sum()).item(), "macro_f1": f1.mean().item()}


def make(name: str, folder: Path, settings: Settings, home: Path) -> Encoder:
    """Train an encoder and write it; a former one of that name is replaced once this one is on disk."""
    task = TASKS[name]
    fit_on, held = examples_of(name, settings, home)
    model, tokenizer = loaded(task, settings, home)
    begin = time.perf_counter()
    train(model, Examples(fit_on, tokenizer, settings.max_length), settings, name)
    trained = time.perf_counter()
    figures = measure(model, Examples(held, tokenizer, 128), name)
    about = {
        "name": name,
        "data": task.data,
        "labels": task.labels,
        "base": settings.base,
        "train": len(fit_on),
        "held_out": len(held),
        **figures,
        "settings": dataclasses.asdict(settings),
        "seed": settings.seed,
        "seconds": {"training": trained - begin, "measuring": time.perf_counter() - trained},
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
        made = Path(scratch) / "made"
        with _silent():
            model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        for file, rows in (("train", fit_on), ("held_out", held)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (made / f"{file}.jsonl").write_text(text, encoding="utf-8")
        about["bytes"] = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if (folder / name).exists():
            (folder / name).rename(Path(scratch) / "former")
        made.rename(folder / name)
    found = _found(name, folder, settings)
    assert found is not None
    return found


def tune(name: str, settings: Settings, home: Path) -> dict[str, float]:
    """Train on a part of the training examples and measure on the rest of them."""
    rows, _ = examples_of(name, settings, home)
    random.Random(settings.seed).shuffle(rows)
    cut = round(len(rows) * TUNED)
    model, tokenizer = loaded(TASKS[name], settings, home)
    begin = time.perf_counter()
    train(model, Examples(rows[cut:], tokenizer, settings.max_length), settings, name)
    seconds = time.perf_counter() - begin
    return {**measure(model, Examples(rows[:cut], tokenizer, 128), name), "seconds": seconds}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the bars and the advice of transformers: a new head is meant to be new."""
    logging: Any = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make what is missing or made with other settings")
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--folder", type=Path, help="the folder of all encoders; by default that of MASKHOOKS_CACHE")
    parser.add_argument("--quick", action="store_true", help="a few batches, in a folder that is deleted at the end")
    parser.add_argument("--tune", action="store_true", help="measure on a part of the training examples, write nothing")
    parser.add_argument("--settings", type=json.loads, default={}, help="for --tune: settings that differ, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.settings and not given.tune:
        parser.error("--settings is for --tune: an encoder has the settings of this file")
    torch.set_num_threads(given.threads)
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    changes = {**given.settings, "quick": given.quick}
    wanted = {name: dataclasses.replace(TASKS[name].settings, **changes) for name in given.only}
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = given.folder or default_folder()
        if given.quick and not given.folder:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not given.tune:
            say(f"Encoders are kept in {folder}, which can be deleted.")
        for name, settings in wanted.items():
            if given.tune:
                result[name] = {**tune(name, settings, home), "settings": dataclasses.asdict(settings)}
            else:
                result[name] = _figures(name, folder, settings, home if given.prepare or given.quick else None)
            say(f"{name}: {json.dumps(result[name])}")
    print(
        json.dumps(
            {
                "benchmark": "encoders",
                "quick": given.quick,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "threads": given.threads,
                "folder": None if given.tune else str(folder),
                **result,
            }
        )
    )


def _figures(name: str, folder: Path, settings: Settings, home: Path | None) -> dict[str, Any] | None:
    """What is known of an encoder, made if it is missing and there is a `home`; None if it is not there."""
    found, made = _found(name, folder, settings), False
    if found is None:
        if home is None:
            return None
        found, made = make(name, folder, settings, home), True
    keys = ("train", "held_out", "accuracy", "macro_f1", "seconds")
    return {
        "folder": str(found.folder),
        "made": made,
        **{key: found.about[key] for key in keys},
        "megabytes": sum(found.about["bytes"].values()) / 1e6,
    }


if __name__ == "__main__":
    main()
