"""The digits task (De Cao et al. 2020, table 1 and figure 3): compares attributions with the truth, over seeds.

Each seed trains its own model, and DiffMask on it three times: on the hidden state, on the input given the hidden state
(figure 3e, right), and on the input given itself (figure 3e, left), where nothing can be dropped yet.

    python benchmarks/digits.py [--seeds 5] [--methods all] [--quick]

`--methods all` adds table 1, the other methods in the settings of its authors (see digits_methods.py). `methods` has
them, and DiffMask's masks of the hidden state, on a network trained as the authors train theirs; `variants` has other
settings on that network; `own_network` has what `methods` has on the network of this benchmark. `integrated_gradients`
repeats a mistake of the authors' code, an extra factor; `variants` has them without it, from Captum, whose extra is
needed. A KL is null where it is infinite. With several seeds all are means.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from digits_methods import Method, Methods, train_as_published

from maskhooks import DiffMask, Hooked, Random
from maskhooks.errors import MaskhooksWarning
from maskhooks.toy_tasks import digits

HIDDEN, RIGHT, LEFT = "hidden", "input_given_hidden", "input_given_embedding"
SETTINGS = dict(zip((HIDDEN, RIGHT), digits.SETTINGS.values(), strict=True)) | {
    LEFT: digits.Setting(digits.INPUT, digits.INPUT, 0.05, 500)
}
TABLES = ("methods", "variants", "own_network")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many models, each with its own seed")
    parser.add_argument("--methods", choices=("diffmask", "all"), default="diffmask", help="all: the rest of table 1")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps and examples, under a minute")
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
            explainer = _fitted(hooked, setting, train, validation, seed=seed, quick=given.quick)
            found = digits.attribution(explainer.explain(everything), validation)
            tail = explainer.result.log[-100:]
            row[name] = {
                **digits.distances(found, validation),
                "multiplier": tail[-1]["multiplier"],
                "divergence": sum(r["divergence"] for r in tail) / len(tail),
                "within_margin": explainer.within_margin,
            }
        if given.methods == "all":
            row |= _other_methods(model, row[HIDDEN], train, validation, seed=seed, quick=given.quick)
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
                **({key: _mean([row[key] for row in rows]) for key in TABLES if key in rows[0]}),
            }
        )
    )


def _fitted(
    hooked: Hooked, setting: digits.Setting, train: digits.Digits, validation: digits.Digits, *, seed: int, quick: bool
) -> DiffMask:
    explainer = DiffMask(hooked, setting.sites, conditioned_on=setting.conditioned_on, margin=setting.margin, seed=seed)
    steps = setting.steps // 4 if quick else setting.steps
    return explainer.fit(train.loader(shuffle=True), validation.loader(500), steps=steps, progress=False)


def _other_methods(
    own: digits.DigitsModel,
    masks: Mapping[str, float],
    train: digits.Digits,
    validation: digits.Digits,
    *,
    seed: int,
    quick: bool,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the tables by name, and by method the distance from the truth.

    Args:
        own: this benchmark's network.
        masks: the distance of its masks.
    """
    authors = train_as_published(train, validation, seed=seed, epochs=5 if quick else 50)
    print(f"authors' network: accuracy {digits.accuracy(authors, validation)}", file=sys.stderr, flush=True)
    seen, shown, steps = (train[:1000], validation[:100], 50) if quick else (train, validation, 500)
    there, here = Methods(authors, seen, shown, steps), Methods(own, seen, shown, steps)
    explainer = partial(_fitted, there.hooked, SETTINGS[HIDDEN], train, validation, seed=seed, quick=quick)
    diffmask = {"diffmask": lambda: there.explained(explainer())}
    return {
        "methods": _distances({**there.published(), **diffmask}, shown),
        "variants": _distances(there.variants(), shown),
        "own_network": {**_distances(here.published(), shown), "diffmask": _finite(masks)},
    }


def _distances(methods: Mapping[str, Method], data: digits.Digits) -> dict[str, dict[str, float | None]]:
    """Return the distance of each method's attributions from the truth."""
    found = {}
    for name, method in methods.items():
        begun = time.perf_counter()
        found[name] = _finite(digits.distances(method(), data))
        print(f"{name} {found[name]} {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return found


def _finite(distances: Mapping[str, float]) -> dict[str, float | None]:
    """Return KL and JS, None where infinite: JSON has no infinity."""
    return {key: None if math.isinf(distances[key]) else distances[key] for key in ("kl", "js")}


def _mean(rows: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """Return the means over seeds of each method's distances; None where one is infinite."""
    totals = {
        name: {key: sum(math.inf if row[name][key] is None else row[name][key] for row in rows) for key in distances}
        for name, distances in rows[0].items()
    }
    return {name: _finite({key: total / len(rows) for key, total in one.items()}) for name, one in totals.items()}


if __name__ == "__main__":
    main()
