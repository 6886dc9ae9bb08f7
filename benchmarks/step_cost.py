"""The cost of hooks, training steps and attribution, in units U of one bare forward pass without gradients.

A BERT encoder with 6 layers of 384 units, random weights, batch 32, length 64; one thread, process time. Each cost is
measured between two bare forward passes in the same process; the result is the median ratio. Training steps are timed
through `fit` itself, from one batch to the next, with validation and logs off. With `--stored` only the training steps
are measured, with clean passes cached in memory as bfloat16.

    python benchmarks/step_cost.py [--quick] [--stored]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import maskhooks
from maskhooks.passes.clean_cache import CleanCache

BATCH, LENGTH = 32, 64


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=5
    )
    return BertForSequenceClassification(config).eval()


def batch(size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (size, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def spent(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def bare(model: nn.Module, data: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return spent(lambda: model(**data))


def beside_bare(model: nn.Module, data: dict[str, torch.Tensor], run: Callable[[], object], repeats: int) -> float:
    """The cost of `run` in bare forward passes: the median of ratios to the mean of the passes before and after it."""
    run()
    units, costs = [bare(model, data)], []
    for _ in range(repeats):
        costs.append(spent(run))
        units.append(bare(model, data))
    return ratio(costs, units)


def ratio(costs: list[float], units: list[float]) -> float:
    """The median of costs over their two neighbours among the units, so that the machine's drift cancels."""
    around = [(before + after) / 2 for before, after in itertools.pairwise(units)]
    return statistics.median(cost / unit for cost, unit in zip(costs, around[-len(costs) :], strict=True))


class Stopwatch(dict[str, torch.Tensor]):
    """A batch that measures the steps that use it, and a bare forward pass between steps."""

    def __init__(self, model: nn.Module, data: dict[str, torch.Tensor]) -> None:
        super().__init__(data)
        self.model = model
        self.steps: list[float] = []
        self.units: list[float] = []
        self._begun: float | None = None

    def to(self, device: torch.device) -> Stopwatch:
        """Called by each step."""
        if self._begun is not None:
            self.steps.append(time.process_time() - self._begun)
        self.units.append(bare(self.model, dict(self)))
        self._begun = time.process_time()
        return self


def step_cost(
    hooked: maskhooks.Hooked, data: dict[str, torch.Tensor], steps: int, stored: bool, **settings: Any
) -> float:
    """The median cost of a training step over that of a bare forward pass, through `fit`."""
    recipe = dataclasses.replace(maskhooks.Recipe(), statistics_batches=1, baseline_steps=2)  # these are not measured
    watch = Stopwatch(hooked.model, data)
    explainer = maskhooks.DiffMask(hooked, recipe=recipe, **settings)
    cache = CleanCache(dtype=torch.bfloat16) if stored else None
    explainer.fit([watch], steps=steps + 2, progress=False, accelerator="cpu", cache=cache)
    return ratio(watch.steps[-steps:], watch.units[-steps - 1 :])


def hook_microseconds(repeats: int) -> float:
    """The time added per site and forward pass by reading the outputs of a hundred `nn.Identity` modules."""
    model = nn.Sequential(*[nn.Identity() for _ in range(100)])
    x = torch.zeros(2, 3, 4)
    hooked = maskhooks.wrap(model)
    sites = [f"{index}:output" for index in range(100)]
    with torch.no_grad():
        plain, tapped = [], []
        for _ in range(repeats):
            plain.append(min(spent(lambda: model(x)) for _ in range(20)))
            with hooked.tap(read=sites):
                tapped.append(min(spent(lambda: model(x)) for _ in range(20)))
    return (statistics.median(tapped) - statistics.median(plain)) * 1e6 / 100


def import_over_torch(repeats: int) -> float:
    """The time of `import maskhooks` over `import torch`, in alternating fresh processes."""

    def start(module: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - begun

    pairs = [(start("torch"), start("maskhooks")) for _ in range(repeats + 1)][1:]
    return statistics.median(m for _, m in pairs) / statistics.median(t for t, _ in pairs)


def step_costs(hooked: maskhooks.Hooked, data: dict[str, torch.Tensor], quick: bool, stored: bool) -> dict[str, Any]:
    """The cost of training steps, means over depths and sites."""
    hidden = hooked.sites.tagged("hidden")
    chosen = [hidden[0], hidden[4], hidden[-1]] if quick else hidden
    steps, end = 2 if quick else 9, "_stored" if stored else ""
    inputs = [
        step_cost(hooked, data, steps, stored, sites=[hidden[0]], conditioned_on=hidden[: (site.depth or 0) + 1])
        for site in (chosen[-1:] if quick else chosen)
    ]
    say(f"input_step{end} {statistics.mean(inputs):.3f}")
    costs = {}
    for site in chosen:
        costs[str(site)] = step_cost(hooked, data, steps, stored, sites=[site])
        say(f"hidden_step{end} at {site}: {costs[str(site)]:.3f}")
    return {
        f"input_step{end}": statistics.mean(inputs),
        f"hidden_step{end}": statistics.mean(costs.values()),
        f"hidden_step{end}_by_site": costs,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats on batches of 8, under a minute")
    parser.add_argument("--stored", action="store_true", help="only training steps, with cached clean passes")
    given = parser.parse_args()
    quick = given.quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, data = bert(), batch(8 if quick else BATCH)
    hooked = maskhooks.wrap(model)
    hidden = hooked.sites.tagged("hidden")
    result: dict[str, Any] = {}

    def capture() -> None:
        with torch.no_grad(), hooked.tap(read=hidden):
            hooked(data)

    if given.stored:
        result |= step_costs(hooked, data, quick, stored=True)
    else:
        result["capture"] = beside_bare(model, data, capture, 3 if quick else 25)
        say(f"capture {result['capture']:.3f}")
        result |= step_costs(hooked, data, quick, stored=False)
        recipe = dataclasses.replace(
            maskhooks.Recipe(), statistics_batches=1, baseline_steps=2
        )  # these are not measured
        explainer = maskhooks.DiffMask(hooked, "hidden", recipe=recipe).fit([data], steps=1, progress=False)
        result["attribution"] = beside_bare(model, data, lambda: explainer.explain(data), 3 if quick else 25)
        say(f"attribution {result['attribution']:.3f}")
        result["hook_microseconds"] = hook_microseconds(5 if quick else 25)
        result["import_over_torch"] = import_over_torch(2 if quick else 7)
    print(json.dumps({"benchmark": "step_cost", "quick": quick, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
