"""Planted shortcuts (Bastings et al. 2022): which methods find the words that decide a BERT's answer.

For each kind of planting.py, a small BERT fine-tuned on sentences of SST, positive or negative, of which a fifth has
planted words that decide the label (polarity_* of encoders.py). Explained are held-out sentences with planted words for
the label that the classifier does not give without them, so that the words alone decide; 60, drawn with seed 3.
`tables` has for each kind and method, as means over texts, `precision_at_k`, the share of planted words among the k
highest scores, k as many as are planted, and `mean_rank`, how many of the highest scores cover them all, with
`interval`, the bootstrap interval of 95 % of each. [CLS] and [SEP] do not count, equal scores count in expectation.

`verification` has, over all held-out sentences: `accuracy`, the share of planted labels that the classifier gives;
`changed`, the share of answers that change when the planted words go, and `changed_without` when one of two goes;
`original`, the accuracy on the sentences as they are, and `unplanted`, that of the same encoder trained on these. A
table does not count unless `changed` is .95 or more. `ours` is the better of DiffMask and IBA beside the best method.

    python benchmarks/shortcuts.py [--prepare] [--examples 60] [--kinds single context ordered] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import captum
import planting
import torch
import transformers
from encoders import Encoder, Examples, Row, encoder, prepared, say
from explainers import FITTED, LENGTH, STATISTICS, Methods, Settings, explained, figures, ordered, rows_of, sampled

import maskhooks
from maskhooks.errors import MaskhooksWarning
from maskhooks.metrics.judgement import judge
from maskhooks.progress import track

METHODS = (
    "diffmask",
    "diffmask_per_example",
    "iba",
    "schulz",
    "integrated_gradients",
    "gradient_l2",
    "gradient_x_input",
    "leave_one_out",
    "attention",
    "lime",
    "guan",
    "random",
)
OURS = ("diffmask", "diffmask_per_example", "iba")
SEED = 3
CHANGED = 0.95
SETTINGS = Settings(layer=None, beta=0.1, schulz_beta=10.0, read=2)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Held-out texts of one kind, each as it is and with planted words for the label that it does not get.

    Attributes:
        rows: the texts with planted words and their label.
        verification: what the classifier makes of them.
    """

    rows: list[Row]
    verification: dict[str, Any]

    @classmethod
    def of(cls, model: Any, one: Encoder, kind: str, limit: int | None = None) -> Texts:
        tokenizer, plain = one.tokenizer(), rows_of(one.held_out)[:limit]
        draw = random.Random(SEED)
        before = answers(model, tokenizer, plain)
        rows = [
            {**row, "label": 1 - answer, "text": planting.planted(row["text"], kind, 1 - answer, draw)}
            for row, answer in zip(plain, before, strict=True)
        ]
        labels, after = [row["label"] for row in rows], answers(model, tokenizer, rows)

        def changed(*words: str) -> float:
            gone = [{**row, "text": planting.without(row["text"], words)} for row in rows]
            return share(one != other for one, other in zip(after, answers(model, tokenizer, gone), strict=True))

        found = {
            "accuracy": share(one == label for one, label in zip(after, labels, strict=True)),
            "changed": changed(*planting.WORDS),
            "original": one.about["accuracy"],
            "texts": len(rows),
        }
        if kind != "single":
            names = {"indicator": planting.INDICATORS, "context": [planting.CONTEXT]}
            each = names if kind == "context" else {word: [word] for word in planting.INDICATORS}
            found["changed_without"] = {name: changed(*words) for name, words in each.items()}
        return cls(rows, found)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """The class that a model gives each text."""
    examples, found = Examples(rows, tokenizer, LENGTH), [0] * len(rows)
    for numbers in examples.batches(64):
        for number, answer in zip(numbers, model(**examples.batch(numbers)).logits.argmax(-1).tolist(), strict=True):
            found[number] = answer
    return found


def share(values: Iterator[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def truth(batches: Sequence[Mapping[str, torch.Tensor]], tokenizer: Any) -> list[list[float]]:
    """For each text 1 at planted words."""
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(planting.WORDS)))
    return [row for batch in batches for row in torch.isin(batch["input_ids"], ids).float().tolist()]


def methods_of(one: Encoder, settings: Settings, folder: Path | None = None) -> Methods:
    """The methods on a classifier; its amortised masks are in its folder, and go with it when it is made again."""
    tokenizer, rows = one.tokenizer(), sampled(rows_of(one.train), STATISTICS, SEED)
    kept = folder or one.folder / "shortcuts_diffmask"
    return Methods(maskhooks.wrap(one.model()), tokenizer, ordered(rows, tokenizer), kept, settings)


def fit(one: Encoder, kind: str, methods: Methods) -> float:
    """Fit the amortised masks on planted training texts, unless they are there; the seconds that it took."""
    draw = random.Random(SEED)
    rows = sampled(rows_of(one.train), methods.settings.fit_steps * FITTED, SEED)
    texts = []
    for row in rows:
        text = planting.without(row["text"], planting.WORDS)
        texts.append({**row, "text": planting.planted(text, kind, draw.randrange(2), draw)})
    return methods.fit_amortised(Examples(texts, methods.tokenizer, LENGTH))


def measure(methods: Mapping[str, Methods], texts: Mapping[str, Texts], count: int) -> dict[str, Any]:
    """The figures of all methods on all kinds."""
    tables: dict[str, dict[str, Any]] = {kind: {} for kind in methods}
    for kind, method in track([(kind, method) for kind in methods for method in METHODS], "methods on kinds"):
        one = methods[kind]
        batches = ordered(sampled(texts[kind].rows, count, SEED), one.tokenizer)
        explanation, seconds = explained(one.make(method), batches)
        judgements = judge(explanation, ["precision-at-k", "mean-rank"], truth=truth(batches, one.tokenizer))
        tables[kind][method] = figures(dict(zip(("precision_at_k", "mean_rank"), judgements, strict=True)), seconds)
        say(f"{kind} {method}: {json.dumps(tables[kind][method])}")
    return {"tables": tables, "ours": {kind: ours(table) for kind, table in tables.items()}}


def ours(table: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The better of DiffMask and IBA beside the best method, by precision and then by rank."""

    def order(name: str) -> tuple[float, float]:
        return -table[name]["precision_at_k"], table[name]["mean_rank"]

    mine, best = min(OURS, key=order), min(table, key=order)
    return {
        "method": mine,
        "best": best,
        "precision_behind": table[best]["precision_at_k"] - table[mine]["precision_at_k"],
        "rank_behind": table[mine]["mean_rank"] - min(one["mean_rank"] for one in table.values()),
    }


def compared(kinds: Sequence[str], count: int, quick: bool) -> dict[str, Any]:
    """The figures of all methods, on masks that are there, or quick ones that are not kept."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        methods, texts = {}, {}
        for kind in kinds:
            one = encoder(f"polarity_{kind}")
            if quick:
                settings = dataclasses.replace(SETTINGS, fit_steps=16, logit_steps=4)
                methods[kind] = methods_of(one, settings, Path(scratch) / kind)
                fit(one, kind, methods[kind])
            else:
                methods[kind] = methods_of(one, SETTINGS)
            if methods[kind].fit_seconds is None:
                raise SystemExit(
                    f"There are no amortised masks for {kind} with the settings of today. Run: "
                    f"python benchmarks/shortcuts.py --prepare --kinds {kind}"
                )
            texts[kind] = Texts.of(methods[kind].hooked.model, one, kind, 64 if quick else None)
            say(f"{kind}: {json.dumps(texts[kind].verification)}")
        result = measure(methods, texts, count)
    verified = {kind: one.verification for kind, one in texts.items()}
    return {
        "examples": count,
        "settings": dataclasses.asdict(SETTINGS),
        "verification": {**verified, "unplanted": encoder("polarity").about["accuracy"]},
        "counts": {kind: one["changed"] >= CHANGED for kind, one in verified.items()},
        **result,
        "fit_seconds": {kind: one.fit_seconds for kind, one in methods.items()},
        "minutes": (time.perf_counter() - begun) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the encoders and amortised masks that are missing")
    parser.add_argument("--examples", type=int, default=60, help="texts of each kind")
    parser.add_argument("--kinds", nargs="*", choices=planting.KINDS, default=list(planting.KINDS))
    parser.add_argument("--quick", action="store_true", help="a few texts of one kind and few steps, within a minute")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    if given.prepare:
        home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
        made = {kind: prepared(f"polarity_{kind}", home) for kind in given.kinds}
        result: dict[str, Any] = {
            "prepared": {
                kind: {"encoder": one.about["seconds"], "diffmask": fit(one, kind, methods_of(one, SETTINGS))}
                for kind, one in made.items()
            },
            "unplanted": prepared("polarity", home).about["seconds"],
        }
    else:
        result = compared(
            given.kinds[:1] if given.quick else given.kinds, 4 if given.quick else given.examples, given.quick
        )
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "captum": captum.__version__}
    print(json.dumps({"benchmark": "shortcuts", "quick": given.quick, **about, **result}))


if __name__ == "__main__":
    main()
