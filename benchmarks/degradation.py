"""Degradation of a BERT's predictions as tokens are removed in order of their scores, for all methods.

Encoders for SST, AG News and MNLI (those of encoders.py), and 60 held-out texts of each, drawn with seed 3. `tables`
has for each set and method, as means over texts: `morf` and `lerf`, the areas under the probability of the predicted
class as tokens are removed from the highest score down and from the lowest up, in ten steps; `morf_lerf`, LeRF - MoRF;
`comprehensiveness` and `sufficiency` (ERASER); `interval`, the bootstrap interval of 95 % of each; and
`seconds_per_example` in batches of 32, without what is fitted beforehand. Tokens are deleted and the others move
together, as Jiang et al. 2020 do; [CLS] and [SEP] stay. `mask_tables` has the areas with removed tokens replaced by
[MASK]. `iba_above` compares IBA's `morf_lerf` with integrated gradients, LIME and random scores: paired permutation
tests, with p-values by Holm over all sets. `speed` is the time of integrated gradients over that of amortised DiffMask,
and `break_even` the number of texts from which the fit of the masks costs less time than it saves.

Layers and prices of the bottlenecks were chosen by --tune, on training texts of SST and AG News. Of the four sets of
Jiang et al., IMDB and RTE are not at hand, and the encoders are smaller than theirs.

    python benchmarks/degradation.py [--prepare] [--examples 60] [--sets sst ag_news mnli] [--quick] [--tune]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import captum
import torch
import transformers
from encoders import Encoder, Examples, encoder, prepared, say
from explainers import (
    FITTED,
    LENGTH,
    STATISTICS,
    Methods,
    Settings,
    explained,
    figures,
    ordered,
    rows_of,
    sampled,
    site,
)

import maskhooks
from maskhooks import IBA, Explanation, Hooked, Schulz
from maskhooks.errors import MaskhooksWarning
from maskhooks.metrics.erasure import AreaBetween
from maskhooks.metrics.intervals import difference, holm
from maskhooks.metrics.judgement import Judgement, judge
from maskhooks.progress import track

SETS = ("sst", "ag_news", "mnli")
METHODS = (
    "iba",
    "schulz",
    "diffmask",
    "diffmask_per_example",
    "integrated_gradients",
    "lime",
    "guan",
    "leave_one_out",
    "attention",
    "random",
)
RIVALS = ("integrated_gradients", "lime", "random")
CURVES = ("morf", "lerf")
METRICS = {"delete": (*CURVES, "comprehensiveness", "sufficiency"), "mask": CURVES}
SEED = 3
SETTINGS = Settings(layer=None, beta=0.1, schulz_beta=10.0, read=2, logit_steps=100)
LAYERS = (None, 0, 1, 2, 3, 4, 5)
BETAS = {IBA: (1e-5, 1e-2, 0.1, 1.0, 10.0), Schulz: (0.1, 1.0, 10.0)}

Batches = list[dict[str, torch.Tensor]]
Found = dict[str, dict[str, Any]]  # by set and method


def methods_of(one: Encoder, settings: Settings, folder: Path | None = None) -> Methods:
    """The methods on an encoder; its amortised masks are in its folder, and go with it when it is made again."""
    tokenizer, rows = one.tokenizer(), sampled(rows_of(one.train), STATISTICS, SEED)
    kept = folder or one.folder / "degradation_diffmask"
    return Methods(maskhooks.wrap(one.model()), tokenizer, ordered(rows, tokenizer), kept, settings)


def fit(one: Encoder, methods: Methods) -> float:
    """Fit the amortised masks on training texts, unless they are there; the seconds that it took."""
    texts = sampled(rows_of(one.train), methods.settings.fit_steps * FITTED, SEED)
    return methods.fit_amortised(Examples(texts, methods.tokenizer, LENGTH))


def judged(explanation: Explanation, hooked: Hooked, batches: Sequence[Any], operator: str) -> dict[str, Judgement]:
    """What each metric says; the area between the curves is that under one minus that under the other."""
    metrics = [{"name": name, "operator": operator} for name in METRICS[operator]]
    found = dict(zip(METRICS[operator], judge(explanation, metrics, hooked=hooked, batches=batches), strict=True))
    morf, lerf = found["morf"], found["lerf"]
    between: Any = AreaBetween(operator="mask" if operator == "mask" else "delete")
    return {**found, "morf_lerf": dataclasses.replace(morf, metric=between, values=lerf.values - morf.values)}


def measure(methods: Mapping[str, Methods], batches: Mapping[str, Batches]) -> dict[str, Any]:
    """The figures of all methods on all sets."""
    tables: dict[str, Found] = {operator: {name: {} for name in methods} for operator in METRICS}
    between: dict[str, dict[str, Judgement]] = {name: {} for name in methods}
    for name, method in track([(name, method) for name in methods for method in METHODS], "methods on sets"):
        one = methods[name]
        explanation, seconds = explained(one.make(method), batches[name])
        for operator, table in tables.items():
            found = judged(explanation, one.hooked, batches[name], operator)
            table[name][method] = figures(found, seconds)
            if operator == "delete":
                between[name][method] = found["morf_lerf"]
        say(f"{name} {method}: {json.dumps(tables['delete'][name][method])}")
    fits = {name: one.fit_seconds for name, one in methods.items()}
    return {
        "operator": "delete",
        "tables": tables["delete"],
        "mask_tables": tables["mask"],
        "iba_above": above(between),
        **costs(tables["delete"], fits),
    }


def above(between: Mapping[str, Mapping[str, Judgement]]) -> list[dict[str, Any]]:
    """IBA's area between the curves minus that of each rival, with paired tests."""
    pairs = [(name, rival) for name in between for rival in RIVALS]
    found = {f"{name} {rival}": difference(between[name]["iba"], between[name][rival]) for name, rival in pairs}
    adjusted = holm({pair: one.p_value for pair, one in found.items()})
    return [
        {
            "set": name,
            "rival": rival,
            "above": one.difference.mean > 0,
            "difference": one.difference.mean,
            "interval": [one.difference.low, one.difference.high],
            "p_value": adjusted[pair],
        }
        for (name, rival), (pair, one) in zip(pairs, found.items(), strict=True)
    ]


def costs(tables: Found, fits: Mapping[str, float | None]) -> dict[str, Any]:
    """How many times quicker amortised masks are, and from how many texts on their fit pays."""

    def even(name: str, method: str) -> int | None:
        saved = tables[name][method]["seconds_per_example"] - tables[name]["diffmask"]["seconds_per_example"]
        return math.ceil((fits[name] or 0.0) / saved) if saved > 0 else None

    slow = ("integrated_gradients", "diffmask_per_example")
    return {
        "speed": {
            name: table[slow[0]]["seconds_per_example"] / table["diffmask"]["seconds_per_example"]
            for name, table in tables.items()
        },
        "break_even": {name: {method: even(name, method) for method in slow} for name in tables},
        "fit_seconds": fits,
    }


def tune(count: int, names: Iterable[str]) -> Found:
    """The mean area between the curves by layer and price of the bottlenecks, on training texts."""
    tried: Found = {}
    jobs = [(kind, layer, beta) for kind, betas in BETAS.items() for layer in LAYERS for beta in betas]
    for name in names:
        one = encoder(name)
        hooked, tokenizer = maskhooks.wrap(one.model()), one.tokenizer()
        rows = sampled(rows_of(one.train), STATISTICS + count, SEED + 1)
        batches, learned = (ordered(part, tokenizer) for part in (rows[:count], rows[count:]))
        for kind, layer, beta in track(jobs, f"trying settings on {name}"):
            explainer = kind(hooked, site(layer), beta=beta).fit(learned, progress=False)
            explanation, _ = explained(explainer, batches)
            reached = judged(explanation, hooked, batches, "delete")["morf_lerf"].mean
            tried.setdefault(f"{kind.name} {layer} {beta:g}", {})[name] = reached
            say(f"{name} {kind.name} layer {layer} beta {beta:g}: {reached:.4f}")
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the encoders and amortised masks that are missing")
    parser.add_argument("--examples", type=int, default=60, help="texts of each set")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--quick", action="store_true", help="a few texts of SST and few steps, within a minute")
    parser.add_argument("--tune", action="store_true", help="try settings of the bottlenecks on training texts")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    if given.prepare:
        home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
        made = {name: prepared(name, home) for name in given.sets}
        result: dict[str, Any] = {
            "prepared": {
                name: {"encoder": one.about["seconds"], "diffmask": fit(one, methods_of(one, SETTINGS))}
                for name, one in made.items()
            }
        }
    elif given.tune:
        result = {"tuned": tune(given.examples, given.sets)}
    else:
        result = compared(["sst"] if given.quick else given.sets, 4 if given.quick else given.examples, given.quick)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "captum": captum.__version__}
    print(json.dumps({"benchmark": "degradation", "quick": given.quick, **about, **result}))


def compared(names: Sequence[str], count: int, quick: bool) -> dict[str, Any]:
    """The figures of all methods, on masks that are there, or quick ones that are not kept."""
    begun, made = time.perf_counter(), {name: encoder(name) for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        methods = {}
        for name, one in made.items():
            if quick:
                settings = dataclasses.replace(SETTINGS, fit_steps=16, logit_steps=4)
                methods[name] = methods_of(one, settings, Path(scratch) / name)
                fit(one, methods[name])
            else:
                methods[name] = methods_of(one, SETTINGS)
            if methods[name].fit_seconds is None:
                raise SystemExit(
                    f"There are no amortised masks of {name} with the settings of today. Run: "
                    f"python benchmarks/degradation.py --prepare --sets {name}"
                )
        batches = {
            name: ordered(sampled(rows_of(one.held_out), count, SEED), methods[name].tokenizer)
            for name, one in made.items()
        }
        result = measure(methods, batches)
    return {
        "examples": count,
        "settings": dataclasses.asdict(SETTINGS),
        "accuracy": {name: one.about["accuracy"] for name, one in made.items()},
        **result,
        "minutes": (time.perf_counter() - begun) / 60,
    }


if __name__ == "__main__":
    main()
