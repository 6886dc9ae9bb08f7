"""What a newcomer gets: `maskhooks fit` with nothing but a model and data, as a process, and with a budget of time.

On the small BERT of `$MASKHOOKS_DATA/models/minilm-sst5` and the sentences of `$MASKHOOKS_DATA/data/sst` (default
../shared), and, with `--second NAME`, on another encoder of `benchmarks/encoders.py`. `passes` is the time of the whole
process in units of one bare forward pass of a batch of 32, the median over the training batches, measured before and
after it with the same threads. Gates are rounded at one half, on sentences that the fit never saw; figures are means
over the masked sites. `told_over_real` is what the fit told before its first step, over what it took. With the budget,
`budget_masked` is measured on the sentences that the fit holds out, beside what the fit without a budget had at that
time (`default_masked_then`).

    python benchmarks/default_fit.py [--quick] [--second mnli] [--budget 5m]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from encoders import Encoder, encoder

import maskhooks
from maskhooks.cli.material import Material
from maskhooks.errors import MaskhooksWarning
from maskhooks.settings.duration import seconds

_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def told(text: str) -> float:
    """The seconds of a duration as the fit writes it, such as `9 min 40 s`."""
    return sum(float(n.replace(",", "")) * _UNITS[unit] for n, unit in re.findall(r"([\d.,]+) (d|h|min|s)\b", text))


class Process:
    """A run of the command line.

    Attributes:
        seconds: how long it took.
        told: the estimate before the first step, as seconds from the beginning; None if there was none.
        marks: seconds from the beginning and steps done, as its progress told.
    """

    def __init__(self, words: list[str]) -> None:
        begun = time.monotonic()
        self.told: float | None = None
        self.marks: list[tuple[float, int]] = []
        command = [sys.executable, "-m", "maskhooks", *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=sys.stderr, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                say(line.rstrip())
                now = time.monotonic() - begun
                if found := re.search(r"Training .* takes about ([^,]*)", line):
                    self.told = now + told(found[1])
                if found := re.match(r"training: ([\d,]+) of", line):
                    self.marks.append((now, int(found[1].replace(",", ""))))
        self.seconds = time.monotonic() - begun
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")

    def step_at(self, moment: float) -> int:
        """The steps done at a moment, in seconds from the beginning."""
        before = [(0.0, 0), *(mark for mark in self.marks if mark[0] <= moment)][-1]
        after = next((mark for mark in self.marks if mark[0] > moment), before)
        part = (moment - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        return round(before[1] + part * (after[1] - before[1]))


def forward_seconds(model: Any, batches: list[Any]) -> float:
    """The median time of a bare forward pass without gradients."""
    found = []
    with torch.no_grad():
        for batch in [batches[0], *batches]:  # the first one warms up
            begun = time.perf_counter()
            model(**{key: value for key, value in batch.items() if key != "labels"})
            found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def steps_of(folder: Path) -> int:
    """The training steps that were made."""
    with (folder / "log.csv").open(newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def validation(folder: Path) -> list[dict[str, str]]:
    """The rows that a run wrote."""
    with (folder / "validation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def masked_at(folder: Path, step: float) -> float | None:
    """The masked fraction, mean over sites, at the last validation up to a step; with sampled gates."""
    rows = [row for row in validation(folder) if int(row["step"]) <= step]
    last = [float(row["expected_l0"]) for row in rows if row["step"] == rows[-1]["step"]]
    return 1 - statistics.mean(last) if last else None


def chosen_masked(folder: Path, explainer: Any) -> float:
    """The masked fraction of the chosen masks, mean over sites, with sampled gates."""
    chosen = explainer.result.chosen_steps
    rows = {(row["site"], int(row["depth"]), int(row["step"])): row for row in validation(folder)}
    kept = [float(rows[one.label, one.depth, chosen[str(one)]]["expected_l0"]) for one in explainer.groups]
    return 1 - statistics.mean(kept)


def evaluated(folder: Path, model: Any, held: Iterable[Any]) -> tuple[Any, dict[str, Any]]:
    """The explainer, and what its masks do on sentences that the fit never saw."""
    explainer: Any = maskhooks.load(folder, model)
    rows = explainer.evaluate(held, progress=False)

    def mean(key: str) -> float:
        return statistics.mean(row[key] for row in rows)

    return explainer, {
        "hidden_masked": 1 - mean("rounded_kept"),
        "rounded_agreement": mean("rounded_agreement"),
        "rounded_divergence": mean("rounded_divergence"),
        "divergence": mean("divergence"),
        "within_margin": bool(explainer.within_margin),
        "by_site": {row["site"]: [1 - row["rounded_kept"], row["rounded_divergence"]] for row in rows},
    }


def measure(one: Encoder, home: Path, quick: bool, budget: str | None) -> dict[str, Any]:
    """The figures of one encoder."""
    data = ["--data", str(one.train), "--device", "cpu"]
    data += ["--second-column", one.columns.second] if one.columns.second else []
    data += ["--limit", "96"] if quick else []
    material = Material.of(str(one.folder), "cpu", columns=one.columns)
    model: Any = material.hooked.model
    train, _ = material.for_training(str(one.train), None, 96 if quick else None)
    held, _ = material.for_training(str(one.held_out), None, 40 if quick else 2000)
    units = list(itertools.islice(train, 40))
    before = forward_seconds(model, units)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "default"
        steps = ["--steps", "16"] if quick else []
        run = Process(["fit", str(one.folder), *data, *steps, "--out", str(folder)])
        after = forward_seconds(model, units)
        _, found = evaluated(folder, model, held)
        result = {
            "passes": run.seconds / statistics.mean([before, after]),
            "minutes": run.seconds / 60,
            **found,
            "told_over_real": None if run.told is None else run.told / run.seconds,
            "forward_seconds": [before, after],
            "steps": steps_of(folder),
            "threads": torch.get_num_threads(),
        }
        if budget is not None:
            say(f"{one.name}: {json.dumps(result)}")
            limited = Path(name) / "budget"
            spent = Process(["fit", str(one.folder), *data, "--out", str(limited), "--budget", budget]).seconds
            less, found = evaluated(limited, model, held)
            result |= {
                "budget": budget,
                "budget_over_real": seconds(budget) / spent,
                "budget_masked": chosen_masked(limited, less),
                "default_masked_then": masked_at(folder, run.step_at(seconds(budget))),
                "with_budget": {**found, "steps": steps_of(limited)},
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sentences and steps, under a minute")
    parser.add_argument("--first", default="sst", help="the encoder, also fitted with a budget")
    parser.add_argument("--second", help="another encoder, with the same defaults")
    parser.add_argument("--budget", default="5m")
    given = parser.parse_args()
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    result = measure(encoder(given.first), home, given.quick, None if given.quick else given.budget)
    if given.second:
        say(json.dumps(result))
        result["second"] = {"encoder": given.second, **measure(encoder(given.second), home, given.quick, None)}
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "default_fit", "quick": given.quick, **about, **result}))


if __name__ == "__main__":
    main()
