"""How many bits each layer of a small BERT has, at several prices of information, and whether predictions survive.

The small BERT of `$MASKHOOKS_DATA/models/minilm-sst5` (default ../shared). The noise has the statistics of 960 training
sentences; explained are the first sentences of dev with 20 to 32 word pieces. For each price `beta` and depth: the bits
of a sentence, mean and standard deviation; what is lost to the next depth; the share of sentences of which the next
depth has fewer bits; and the share of sentences whose predicted class stays when the layer's values are mixed with
noise as the bottleneck says, averaged over eight draws.

    python benchmarks/information_profile.py [--quick] [--sentences 24] [--prices 1e-5,10] [--steps 10] [--out FILE]

With --out, the picture of a sentence at the last price is written to FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from torch import Tensor

import maskhooks
from maskhooks import IBA, Explanation
from maskhooks.data import sst
from maskhooks.errors import MaskhooksWarning
from maskhooks.explanations.profile import profile
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import masked_pass
from maskhooks.progress import track
from maskhooks.seeds import generator

DRAWS = 8
SHOWN = "as surreal as a dream"  # the beginning of the sentence in the picture

Batch = dict[str, Tensor]


@torch.no_grad()
def unchanged(iba: IBA, batch: Batch) -> list[float]:
    """How often the predicted class stays, at each site, with the gates that `explain` has just optimised."""
    clean = clean_pass(iba.hooked, batch, iba.reads)
    before: Any = clean.outputs
    found = []
    for group in iba.groups:
        same = 0
        for draw in range(DRAWS):
            _, after = masked_pass(clean, group, generator(0, draw))
            same += int((before.logits.argmax(-1) == after.logits.argmax(-1)).all())  # type: ignore[union-attr]
        found.append(same / DRAWS)
    return found


def measured(iba: IBA, batches: list[Batch]) -> tuple[Explanation, dict[str, Any]]:
    """All rows, and the figures of one price."""
    parts, kept = [], []
    begun = time.process_time()
    for number, batch in enumerate(track(batches, f"explaining at beta {iba.beta:g}")):
        parts.append(iba.explain(batch, start_index=number))
        kept.append(unchanged(iba, batch))
    seconds = time.process_time() - begun
    explanation = Explanation.concat(parts)
    rows = profile(explanation)
    sums = np.array([[float(one.select(depth=row.depth)["score"].sum()) for row in rows] for one in parts])
    return explanation, {
        "depths": [row.depth for row in rows],
        "bits": [round(row.total, 1) for row in rows],
        "deviation": [round(row.total_deviation, 1) for row in rows],
        "bits_of_a_position": [round(row.mean, 2) for row in rows],
        "lost": [round(row.lost, 1) for row in rows[:-1]],
        "lost_deviation": [round(row.lost_deviation, 1) for row in rows[:-1]],
        "falls": (np.diff(sums, axis=1) < 0).mean(0).round(3).tolist(),
        "unchanged": np.mean(kept, axis=0).round(3).tolist(),
        "processor_seconds_a_sentence": round(seconds / len(batches), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sentences, in about a minute")
    parser.add_argument("--sentences", type=int, default=24)
    parser.add_argument("--prices", default="1e-5,10", help="values of beta")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="file of the picture")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    path = home / "models" / "minilm-sst5"
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    hooked = maskhooks.wrap(model, tokenizer=tokenizer)

    def texts(part: str) -> list[str]:
        return [one.text for one in sst.read(home / "data" / "sst" / f"{part}.txt")]

    def encoded(sentences: list[str]) -> Batch:
        return dict(tokenizer(sentences, padding=True, return_tensors="pt"))

    known = texts("train")[: 64 if given.quick else 960]
    train = [encoded(known[k : k + 32]) for k in range(0, len(known), 32)]
    fitting = [text for text in texts("dev") if 20 <= len(tokenizer(text)["input_ids"]) <= 32]
    chosen = fitting[: 2 if given.quick else given.sentences]
    recipe = {"name": "iba", "steps": given.steps}
    found: dict[str, Any] = {}
    for price in map(float, given.prices.split(",")):
        iba = IBA(hooked, "hidden", beta=price, recipe=recipe).fit(train, progress=False)
        _, found[f"{price:g}"] = measured(iba, [encoded([text]) for text in chosen])
        print(f"beta {price:g}: {found[f'{price:g}']['bits']} bits", file=sys.stderr, flush=True)
    if given.out is not None:
        shown = iba.explain(encoded([next(text for text in fitting if text.lower().startswith(SHOWN))]))
        shown.plot(kind="profile").savefig(given.out, dpi=100)
    result = {
        "benchmark": "information_profile",
        "quick": given.quick,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentences": len(chosen),
        "steps": given.steps,
        "prices": found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
