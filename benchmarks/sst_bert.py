"""DiffMask on a BERT for sentiment: how many inputs and hidden states can be masked without changing predictions.

The small BERT of `$MASKHOOKS_DATA/models/minilm-sst5` and the trees of `$MASKHOOKS_DATA/data/sst` (default ../shared).
Masks are trained on nine tenths of the training sentences and selected on the last tenth; the dev sentences are read
once, at the end. Inputs have a mask for each depth, read from the words and the state there. Gates are rounded at one
half; F1 is macro F1 against the labels over the whole dev set, and all figures are means over layers (De Cao et al.
2020, section 3.2, use sampled gates).

    python benchmarks/sst_bert.py [--quick] [--stability] [--only hidden]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

import maskhooks
from maskhooks import DiffMask, Explanation, Recipe
from maskhooks.data import sst
from maskhooks.errors import MaskhooksWarning
from maskhooks.explanations import analyses
from maskhooks.model.outputs import kl
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.passes.masked import masked_pass

HELD_OUT = 0.1
LANGUAGE = dataclasses.replace(Recipe.named("language"), validations=8)
TRAINED = {
    "input": (0.1, dataclasses.replace(LANGUAGE, steps=900, l0_price=0.03)),
    "hidden": (0.1, dataclasses.replace(LANGUAGE, steps=1300)),
}


class Data:
    """Sentences as batches of similar length, shortest first, with little padding.

    Args:
        sentences: trees with labels.
        tokenizer: the model's tokenizer.
        size: sentences per batch.
    """

    def __init__(self, sentences: Sequence[sst.Sentence], tokenizer: Any, size: int) -> None:
        tokens = tokenizer([one.text for one in sentences], truncation=True, max_length=84, return_offsets_mapping=True)
        order = sorted(range(len(sentences)), key=lambda index: len(tokens["input_ids"][index]))
        self.sentiments: list[list[str | None]] = []
        self.batches: list[dict[str, Tensor]] = []
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            self.batches.append(
                dict(
                    tokenizer.pad(
                        {
                            "input_ids": [tokens["input_ids"][index] for index in chosen],
                            "labels": [sentences[index].label for index in chosen],
                        },
                        return_tensors="pt",
                    )
                )
            )
            for index in chosen:
                pieces = sst.piece_sentiments(sentences[index], tokens["offset_mapping"][index])
                self.sentiments.append([None if one is None else sst.SENTIMENTS[one] for one in pieces])

    def loader(self) -> torch.utils.data.DataLoader[Any]:
        """The batches in a new order each time."""
        return torch.utils.data.DataLoader(self.batches, batch_size=None, shuffle=True)  # type: ignore[arg-type]


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """The mean over classes of F1, a fraction."""
    scores = []
    for label in labels.unique():
        hits = ((predicted == label) & (labels == label)).sum().item()
        scores.append(2 * hits / max(1, (predicted == label).sum().item() + (labels == label).sum().item()))
    return statistics.mean(scores)


@torch.no_grad()
def measure(explainer: DiffMask, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Measure, for each masked site and depth, how gates rounded at one half change the predictions."""
    hooked, onward = explainer.hooked, list(dict.fromkeys(masking.site for masking in explainer.maskings))
    seen: list[list[list[Tensor]]] = [[] for _ in explainer.groups]
    for batch in batches:
        clean = clean_pass(hooked, batch, explainer.reads, onward, explainer.recorder)
        for found, group in zip(seen, explainer.groups, strict=True):
            samples, outputs = masked_pass(clean, group, rounded=0.5)
            found.append(
                [
                    samples.per_example(1 - samples.sample),
                    kl(clean.outputs, outputs),
                    clean.outputs.logits.argmax(-1),
                    outputs.logits.argmax(-1),
                    batch["labels"],
                ]
            )
    rows = []
    for masking, found in zip(explainer.maskings, seen, strict=True):
        masked, divergence, before, after, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        f1 = macro_f1(before, labels)
        rows.append(
            {
                "site": str(masking.site),
                "depth": masking.depth,
                "masked": masked.mean().item(),
                "f1": f1,
                "f1_drop": f1 - macro_f1(after, labels),
                "agreement": (before == after).float().mean().item(),
                "divergence": divergence.mean().item(),
            }
        )
    return rows


def train(hooked: maskhooks.Hooked, kind: str, fit_on: Data, choose_on: Data, seed: int, share: float) -> DiffMask:
    margin, recipe = TRAINED[kind]
    recipe = dataclasses.replace(recipe, steps=max(1, round(recipe.steps * share)))
    explainer = DiffMask(hooked, kind, cumulative=False, margin=margin, recipe=recipe, seed=seed)
    return explainer.fit(
        fit_on.loader(),
        choose_on.batches,
        cache=CleanCache(dtype=torch.bfloat16),
        precision="bf16-mixed",
        accelerator="cpu",
    )


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of all sentences and a few steps, under a minute"
    )
    parser.add_argument("--stability", action="store_true", help="also standard deviations over five seeds")
    parser.add_argument("--only", choices=list(TRAINED), help="train only this kind of mask")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    path = home / "models" / "minilm-sst5"
    # Eager attention: in bfloat16 on a CPU its backward pass is several times faster than that of fused attention.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = sst.read(home / "data" / "sst" / "train.txt")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    if given.quick:
        order = order[: len(order) // 8]
    cut = round(len(order) * HELD_OUT)
    choose_on, fit_on = (Data([sentences[i] for i in part], tokenizer, 32) for part in (order[:cut], order[cut:]))
    held = sst.read(home / "data" / "sst" / "dev.txt")
    dev = Data(held[: len(held) // 8] if given.quick else held, tokenizer, 64)
    hooked = maskhooks.wrap(model)
    kinds = [given.only] if given.only else list(TRAINED)
    seeds = range(5 if given.stability else 1)
    share = 0.02 if given.quick else 1.0

    begun, minutes = time.perf_counter(), 0.0
    result: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    explained: dict[str, list[Explanation]] = {kind: [] for kind in kinds}
    within = True
    for seed in seeds:
        for kind in kinds:
            explainer = train(hooked, kind, fit_on, choose_on, seed, share)
            say(f"{kind}, seed {seed}: trained after {(time.perf_counter() - begun) / 60:.1f} minutes")
            explained[kind].append(explainer.explain_all(dev.batches))
            if seed > 0:
                continue
            within = within and bool(explainer.within_margin)
            rows = measure(explainer, dev.batches)
            layers[kind] = rows
            result |= {
                f"{kind}_masked": mean(rows, "masked"),
                f"{kind}_f1_drop": mean(rows, "f1_drop"),
                f"{kind}_agreement": mean(rows, "agreement"),
                f"{kind}_divergence": mean(rows, "divergence"),
            }
            for row in rows:
                say(json.dumps(row))
        if seed == 0:
            minutes = (time.perf_counter() - begun) / 60
    if "hidden" in kinds:
        hidden = explained["hidden"][0]
        result["last_cls_top"] = analyses.top_groups(hidden).get("[CLS]", 0.0)
        kept = analyses.depths_kept(hidden, dev.sentiments)
        result["kept_by_sentiment"] = {row.group: [round(row.depths, 3), round(row.standard_error, 3)] for row in kept}
    if given.stability:
        for kind in kinds:
            result[f"{kind}_deviation"] = analyses.seed_deviation(explained[kind])[-1].deviation
    print(
        json.dumps(
            {
                "benchmark": "sst_bert",
                "quick": given.quick,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "threads": given.threads,
                **result,
                "within_margin": within,
                "minutes": minutes,
                "by_layer": layers,
            }
        )
    )


if __name__ == "__main__":
    main()
