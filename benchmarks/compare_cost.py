"""What `maskhooks.compare` costs over its methods and metrics, and what it does again after a kill.

Sentences of the Stanford Sentiment Treebank through a BERT encoder of 6 layers, explained at the word embeddings by
four methods and judged by four metrics. One thread.

- overhead: wall time of `compare` into a folder, over that of `explain_all` and `judge` called for each method on the
  same batches, minus 1. Both are repeated in turn in one process; each `compare` stands between two bare runs, and the
  result is the median ratio. `overhead_cpu` is the same of CPU time.
- repeated_after_kill: the number of examples that are explained, or judged, again although they were stored, summed
  over SIGKILLs of a child process at random moments. What was stored is read from the files after the kill; what a
  resumed call does is counted at the explainers and at a metric. `different_values` counts values that differ from
  those of an uninterrupted call.

    MASKHOOKS_DATA=shared python benchmarks/compare_cost.py [--quick]

MASKHOOKS_DATA is a folder with data/sst/dev.txt and models/minilm-sst5; by default ../shared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch

import maskhooks
from maskhooks.cli.material import Material
from maskhooks.comparison.methods import methods_of
from maskhooks.data.records import Record, read
from maskhooks.metrics.erasure import Comprehensiveness
from maskhooks.metrics.evidence import Evidence, Floats
from maskhooks.metrics.judgement import judge
from maskhooks.model.outputs import count

METRICS = ["comprehensiveness", "sufficiency", "area-between", "divergence"]
FEW_METRICS = ["comprehensiveness", "area-between"]
SEED = 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """A model, batches of sentences, the methods and the metrics.

    Attributes:
        explained, judged: how many examples were explained by all methods, and judged, since they were set to 0.
    """

    def __init__(self, model: Path, sentences: Sequence[Record], examples: int, size: int, quick: bool) -> None:
        material = Material.of(str(model), "cpu")
        assert material.opened.batch is not None
        self.hooked = material.hooked
        self.batches = [material.opened.batch(sentences[at : at + size]) for at in range(0, examples, size)]
        self.metrics: list[Any] = list(FEW_METRICS if quick else METRICS)
        self.examples = examples
        self.explained = self.judged = 0
        given = [
            {"name": "integrated-gradients", "n_steps": 5 if quick else 10},
            "input-x-gradient",
            "leave-one-out",
            "random",
        ]
        self.explainers: dict[str, Any] = {
            method.label: method.explainer for method in methods_of(given, self.hooked, "input", SEED)
        }

    def bare(self) -> None:
        """What a user would write without `compare`: each method on all batches, then each metric."""
        for explainer in self.explainers.values():
            explanation = explainer.explain_all(self.batches)
            judge(explanation, self.metrics, hooked=self.hooked, batches=self.batches)

    def compare(self, folder: Path, metrics: Sequence[Any] = ()) -> maskhooks.Comparison:
        return maskhooks.compare(
            self.hooked,
            self.explainers,
            self.batches,
            metrics=[*self.metrics, *metrics],
            folder=folder,
            seed=SEED,
            progress=False,
        )

    def overhead(self, repeats: int, work: Path) -> dict[str, float]:
        wall, cpu = [], []
        self.compare(work / "warm")  # imports, and the first passes
        before = timed(self.bare)
        for number in range(repeats):
            folder = work / f"compared-{number}"
            spent = timed(lambda folder=folder: self.compare(folder))  # type: ignore[misc] # mypy infers no type here
            after = timed(self.bare)
            ratios = [2 * spent[clock] / (before[clock] + after[clock]) for clock in (0, 1)]
            wall.append(ratios[0] - 1)
            cpu.append(ratios[1] - 1)
            say(f"repeat {number + 1} of {repeats}: {spent[0]:.1f} s, {ratios[0] - 1:+.3f} over the bare work")
            before = after
            shutil.rmtree(folder)
        return {
            "overhead": statistics.median(wall),
            "overhead_min": min(wall),
            "overhead_max": max(wall),
            "overhead_cpu": statistics.median(cpu),
            "bare_seconds": before[0],
        }

    def kills(self, kills: int, work: Path) -> dict[str, Any]:
        """Kill a child process at random moments, resume here, and count what was done again."""
        counting = Counting(self)
        for explainer in self.explainers.values():
            explainer.scores = self._counted(explainer.scores)
        start = time.perf_counter()
        whole = self.compare(work / "whole", [counting]).rows()
        seconds = time.perf_counter() - start
        total = self.explained, self.judged
        moments, repeated, stored, different = random.Random(SEED), 0, [], 0
        for number in range(kills):
            folder = work / f"killed-{number}"
            at = moments.uniform(0.3, 0.8) * seconds
            process = os.fork()
            if process == 0:
                self.compare(folder, [counting])
                os._exit(0)
            time.sleep(at)
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            assert os.WIFSIGNALED(status), "it ended before it was killed"
            there = [held(folder / kind) for kind in ("explained", "judged")]
            self.explained = self.judged = 0
            rows = self.compare(folder, [counting]).rows()
            repeated += sum(done + had - all_of for done, had, all_of in zip(self._done, there, total, strict=True))
            stored.append(there)
            same = rows["value"].to_numpy() == whole["value"].to_numpy()
            same |= rows["value"].isna().to_numpy() & whole["value"].isna().to_numpy()
            different += int((~same).sum())
            say(f"kill {number + 1} of {kills}, after {at:.1f} s: {there[0]} and {there[1]} stored")
        return {
            "repeated_after_kill": repeated,
            "kills": kills,
            "stored_at_kills": stored,
            "total": list(total),
            "different_values": different,
        }

    @property
    def _done(self) -> tuple[int, int]:
        return self.explained, self.judged

    def _counted(self, scores: Callable[..., Any]) -> Callable[..., Any]:
        def counted(clean: Any) -> Any:
            self.explained += count(clean.outputs)
            return scores(clean)

        return counted


class Counting(Comprehensiveness):
    """Counts the examples that are judged."""

    name = "counting"

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench

    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, evidence: Evidence) -> Floats:
        self.bench.judged += len(evidence.examples)
        return np.zeros(len(evidence.examples))


def held(folder: Path) -> int:
    """The number of examples in the files of all methods in a folder."""
    files = folder.glob("*/part-*.parquet")
    return sum(pd.read_parquet(path, columns=["example"])["example"].nunique() for path in files)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of some work."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few short sentences, one repeat and one kill")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ.get("MASKHOOKS_DATA", Path(__file__).parents[1].parent / "shared"))
    sentences = read(str(shared / "data" / "sst" / "dev.txt"))
    if given.quick:
        sentences = [one for one in sentences if len(one.text.split()) <= 8]
    examples, size, repeats, kills = (8, 4, 1, 1) if given.quick else (16, 8, 3, 2)
    bench = Bench(shared / "models" / "minilm-sst5", sentences, examples, size, given.quick)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"overhead_goal": 0.1, "repeated_goal": 0, "examples": examples}
        result |= bench.overhead(repeats, Path(folder))
        result |= bench.kills(kills, Path(folder))
    result |= {"quick": given.quick, "seconds": time.perf_counter() - start}
    print(json.dumps({key: round(one, 4) if isinstance(one, float) else one for key, one in result.items()}))


if __name__ == "__main__":
    main()
