"""Compute until 60 % of hidden states are masked at a mean divergence of .1 nats, against the authors' recipe.

The small BERT of `$MASKHOOKS_DATA/models/minilm-sst5` on sentences of `$MASKHOOKS_DATA/data/sst` (default ../shared),
all hidden states. Compute is process time in units U, one bare forward pass of a batch without gradients, measured
alternately with training; everything runs in bfloat16 autocast. Means are over sites, on held-out sentences, with
sampled gates; measuring them does not count.

The other side is a plain loop of the authors' recipe: for every batch two passes with separate samples, one for probes
and baselines (Lookahead over centered RMSprop, 3e-4 and 1e-3, with warm-up), one for the multipliers (RMSprop, .3),
each with a full clean forward pass, a full masked one and a backward pass; log P(z != 0) as sparsity; the tanh x 10
probe; layers sampled, well-masked ones less often. It stops at a multiple of our compute; `speedup` is then a lower
bound.

    python benchmarks/time_to_quality.py [--quick]
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

import maskhooks
from maskhooks import DiffMask, Hooked, Recipe
from maskhooks.data import sst
from maskhooks.errors import MaskhooksWarning
from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.group import MaskingGroup, sites_of
from maskhooks.masks.masking import Masking
from maskhooks.masks.probes import PaperMLP
from maskhooks.masks.votes import Vote
from maskhooks.model.outputs import agreement, kl
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.passes.masked import masked_pass
from maskhooks.seeds import generator
from maskhooks.training.evaluation import Measure
from maskhooks.training.optimizers import Lookahead
from maskhooks.training.preparation import gather

MASKED, DIVERGENCE = 0.6, 0.1


class Clock:
    """Adds up the process time of training, and measures U from time to time."""

    def __init__(self, bare: Callable[[], object]) -> None:
        self.bare = bare
        self.spent, self.units = 0.0, [self._unit() for _ in range(4)][1:]
        self._begun: float | None = None

    def go(self) -> None:
        self.stop()
        if len(self.units) < 1 + self.spent / 5:  # every five seconds of training
            self.units.append(self._unit())
        self._begun = time.process_time()

    def stop(self) -> None:
        if self._begun is not None:
            self.spent += time.process_time() - self._begun
        self._begun = None

    @property
    def compute(self) -> float:
        """The process time in U."""
        return self.spent / statistics.median(self.units)

    def _unit(self) -> float:
        begun = time.process_time()
        self.bare()
        return time.process_time() - begun


class Timed(dict[str, Tensor]):
    """A batch that starts the clock when training uses it, or stops it if it only serves to measure."""

    def __init__(self, batch: dict[str, Tensor], action: Callable[[], None]) -> None:
        super().__init__(batch)
        self.action = action

    def to(self, device: torch.device) -> Timed:
        self.action()
        return self


def batches(path: Path, tokenizer: Any, count: int, size: int) -> list[dict[str, Tensor]]:
    sentences = [sentence.text for sentence in sst.read(path)]
    order = torch.randperm(len(sentences), generator=generator(0)).tolist()[: count * size]
    order.sort(key=lambda index: len(sentences[index]))
    made = [
        dict(tokenizer([sentences[i] for i in order[k : k + size]], padding=True, return_tensors="pt"))
        for k in range(0, len(order), size)
    ]
    return [made[i] for i in torch.randperm(len(made), generator=generator(1)).tolist()]


@torch.no_grad()
def quality(hooked: Hooked, groups: Sequence[MaskingGroup], held: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """The masked fraction and the divergence, means over sites."""
    measures = [Measure(group) for group in groups]
    for number, batch in enumerate(held):
        clean = clean_pass(hooked, batch, sites_of(groups))
        for index, measure in enumerate(measures):
            measure.add(clean, kl, generator(2, number, index))
    rows = [measure.row() for measure in measures]
    return 1 - statistics.mean(r["expected_l0"] for r in rows), statistics.mean(r["divergence"] for r in rows)


def ours(hooked: Hooked, train: list[dict[str, Tensor]], held: list[dict[str, Tensor]], clock: Clock, seed: int,
         steps: int) -> list[tuple[float, float, float]]:  # fmt: skip
    """The compute, masked fraction and divergence along a run of DiffMask."""
    marks: list[float] = []

    def measured() -> None:
        clock.stop()
        marks.append(clock.compute)

    checks = 12
    clock.go()
    explainer = DiffMask(
        hooked,
        "hidden",
        recipe=dataclasses.replace(Recipe.named("language"), steps=steps, validations=checks),
        seed=seed,
    )
    explainer.fit(
        [Timed(batch, clock.go) for batch in train],
        [Timed(batch, measured) for batch in held],
        cache=CleanCache(dtype=torch.bfloat16),
        precision="bf16-mixed",
        accelerator="cpu",
        progress=False,
    )
    clock.stop()
    found: dict[int, list[dict[str, Any]]] = {}
    for row in explainer.result.validation:
        found.setdefault(row["step"], []).append(row)
    return [
        (
            marks[number * len(held)],
            1 - statistics.mean(r["expected_l0"] for r in rows),
            statistics.mean(r["divergence"] for r in rows),
        )
        for number, rows in enumerate(found.values())
    ]


class Authors:
    """The authors' training, step by step.

    Args:
        masked: the vector of the mask token, the first site's initial baseline.
    """

    def __init__(self, hooked: Hooked, train: list[dict[str, Tensor]], masked: Tensor, seed: int) -> None:
        self.hooked, self.train, self.seed = hooked, train, seed
        sites = hooked.sites.tagged("hidden")
        self.maskings = [
            Masking(site, site.depth or 0, [Vote((site,), PaperMLP())], HardConcrete(), Learned()) for site in sites
        ]
        self.groups = [MaskingGroup([masking]) for masking in self.maskings]
        gather(hooked, self.maskings, train[:1], torch.device("cpu"))
        for masking in self.maskings:
            assert isinstance(masking.baseline, Learned)
            start = torch.empty(1, *masking.baseline.initial.shape)
            nn.init.xavier_normal_(start)
            masking.baseline.initial.copy_(masked if masking.depth == 0 else start[0])
            masking.baseline.mean.count.zero_()  # the authors learn it in the units of its values
        probes = [w for m in self.maskings for v in m.votes for w in v.probe.parameters()]
        baselines = [w for m in self.maskings for w in m.baseline.parameters()]
        groups: list[dict[str, Any]] = [{"params": probes, "lr": 3e-4}, {"params": baselines, "lr": 1e-3}]
        self.rates = [group["lr"] for group in groups]
        self.gates = Lookahead(torch.optim.RMSprop(groups, alpha=0.99, eps=1e-8, centered=True))
        self.multipliers = [nn.Parameter(torch.ones(())) for _ in sites]
        self.ascent = torch.optim.RMSprop(self.multipliers, lr=0.3, alpha=0.99, eps=1e-8)
        self.running = [{"agreement": 1.0, "kept": 1.0, "steps": 0.0} for _ in sites]

    def step(self, number: int) -> None:
        batch = self.train[number % len(self.train)]
        for turn in range(2):
            source = generator(self.seed, number, turn)
            chosen = self._choose(source)
            group, multiplier = self.groups[chosen], self.multipliers[chosen]
            clean = clean_pass(self.hooked, batch, sites_of(self.groups))
            samples, outputs = masked_pass(clean, group, source)
            divergence = kl(clean.outputs, outputs).mean()
            loss = multiplier * (divergence - DIVERGENCE) + samples.per_example(samples.log_open).mean()
            self.gates.zero_grad()
            self.ascent.zero_grad()
            loss.backward()
            if turn == 0:
                for group, rate in zip(self.gates.param_groups, self.rates, strict=True):
                    group["lr"] = rate * min(1.0, (number + 1) / 1200)
                self.gates.step()
            else:
                assert multiplier.grad is not None
                multiplier.grad.neg_()
                self.ascent.step()
                multiplier.data.clamp_(0, 200)
            running = self.running[chosen]
            same = agreement(clean.outputs, outputs).mean().item()
            running["agreement"] = 0.9 * running["agreement"] + 0.1 * same
            running["kept"] = 0.9 * running["kept"] + 0.1 * samples.expected_l0.mean().item()
            running["steps"] += 1

    def _choose(self, source: torch.Generator) -> int:
        done = [r["agreement"] > 0.75 and r["kept"] < 0.1 and r["steps"] > 100 for r in self.running]
        return int(torch.multinomial(torch.tensor([0.1 if one else 1.0 for one in done]), 1, generator=source))


def reached(rows: Sequence[tuple[float, float, float]]) -> float | None:
    """The compute of the first row that reaches the target."""
    return next(
        (compute for compute, masked, divergence in rows if masked >= MASKED and divergence <= DIVERGENCE), None
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches and few steps, under a minute")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="our training steps per site")
    parser.add_argument(
        "--times", type=float, default=4.0, help="the authors' recipe stops at this multiple of our compute"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    path = home / "models" / "minilm-sst5"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    size, count, steps = (8, 24, 4) if given.quick else (32, 256, given.steps)
    made = batches(home / "data" / "sst" / "train.txt", tokenizer, count, size)
    held, train = made[: count // 12], made[count // 12 :]
    hooked = maskhooks.wrap(model)
    middle = sorted(train, key=lambda batch: batch["input_ids"].shape[1])[len(train) // 2]

    def bare() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(**middle)

    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        clock = Clock(bare)
        mine = ours(hooked, train, held, clock, seed, steps)
        for row in mine:
            say("ours: {:.0f} U, masked {:.3f}, divergence {:.3f}".format(*row))
        limit = given.times * (reached(mine) or mine[-1][0])
        clock, theirs, number = Clock(bare), [], 0
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(seed)
            clock.go()
            authors = Authors(hooked, train, model.get_input_embeddings().weight[tokenizer.mask_token_id], seed)
            while clock.compute < limit and reached(theirs) is None:
                for _ in range(2 if given.quick else 100):
                    clock.go()
                    authors.step(number)
                    number += 1
                clock.stop()
                theirs.append((clock.compute, *quality(hooked, authors.groups, held)))
                say("authors: {:.0f} U, masked {:.3f}, divergence {:.3f}".format(*theirs[-1]))
        own, other = reached(mine), reached(theirs)
        runs.append(
            {
                "seed": seed,
                "ours": own,
                "authors": other,
                "speedup": (other or theirs[-1][0]) / own if own else None,
                "at_least": other is None,
                "our_curve": mine,
                "authors_curve": theirs,
            }
        )
    speedups = [run["speedup"] for run in runs if run["speedup"]]
    print(
        json.dumps(
            {
                "benchmark": "time_to_quality",
                "quick": given.quick,
                "torch": torch.__version__,
                "speedup": statistics.median(speedups) if speedups else None,
                "at_least": any(run["at_least"] for run in runs),
                "runs": runs,
            }
        )
    )


if __name__ == "__main__":
    main()
