"""The digits task (De Cao et al. 2020, table 1 and figure 3): compares attributions with the truth, over seeds.

Each seed trains its own model, and DiffMask on it three times: on the hidden state, on the input given the hidden state
(figure 3e, right), and on the input given itself (figure 3e, left), where nothing can be dropped yet.

    python benchmarks/digits.py [--seeds 5] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from maskhooks import DiffMask, Random
from maskhooks.errors import MaskhooksWarning
from maskhooks.toy_tasks import digits

HIDDEN, RIGHT, LEFT = "hidden", "input_given_hidden", "input_given_embedding"
SETTINGS = dict(zip((HIDDEN, RIGHT), digits.SETTINGS.values(), strict=True)) | {
    LEFT: digits.Setting(digits.INPUT, digits.INPUT, 0.05, 500)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many models, each with its own seed")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps, under a minute")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    train, validation = digits.generate()
    everything = (validation.query, validation.digits, validation.valid)
    rows: list[dict[str, Any]] = []
    for seed in range(1 if given.quick else given.seeds):
        begun = time.perf_counter()
        *_, (_, model) = digits.train_model(train, seed=seed)
        hooked = digits.hook(model)
        row: dict[str, Any] = {"seed": seed, "accuracy": digits.accuracy(model, validation)}
        for name, setting in SETTINGS.items():
            explainer = DiffMask(
                hooked, setting.sites, conditioned_on=setting.conditioned_on, margin=setting.margin, seed=seed
            )
            steps = setting.steps // 4 if given.quick else setting.steps
            explainer.fit(train.loader(shuffle=True), validation.loader(500), steps=steps, progress=False)
            found = digits.attribution(explainer.explain(everything), validation)
            tail = explainer.result.log[-100:]
            row[name] = {
                **digits.distances(found, validation),
                "multiplier": tail[-1]["multiplier"],
                "divergence": sum(r["divergence"] for r in tail) / len(tail),
                "within_margin": explainer.within_margin,
            }
        row["seconds"] = time.perf_counter() - begun
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    others = {
        # KL is infinite, because erasure gives some needed tokens zero, and JSON has no infinity
        "erasure": {**digits.distances(validation.erasure(), validation), "kl": None},
        "random": digits.distances(
            digits.attribution(Random(hooked, digits.HIDDEN).explain(everything), validation), validation
        ),
    }
    print(
        json.dumps(
            {
                "benchmark": "digits",
                "quick": given.quick,
                "torch": torch.__version__,
                "seeds": len(rows),
                "model_accuracy_min": min(r["accuracy"] for r in rows),
                "hidden_kl_max": max(r["hidden"]["kl"] for r in rows),
                "hidden_js_max": max(r["hidden"]["js"] for r in rows),
                "input_given_hidden_kl_max": max(r["input_given_hidden"]["kl"] for r in rows),
                "input_given_embedding_entropy_ratio_min": min(
                    r["input_given_embedding"]["entropy_ratio"] for r in rows
                ),
                "seconds_per_seed": sum(r["seconds"] for r in rows) / len(rows),
                "by_seed": rows,
                "comparators": others,
            }
        )
    )


if __name__ == "__main__":
    main()
