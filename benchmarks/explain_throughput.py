"""The cost of explaining much data over the bare model, its memory, and its recovery from kills.

Sentences of the Stanford Sentiment Treebank, repeated with their words rotated, through a BERT encoder of 6 layers with
masks on all its hidden states. One thread.

- cost: CPU seconds of `explain_to` (batches of similar length, tokenised; masks, rows, files) over those of the model
  alone on the same batches, also tokenised, without gradients. Texts come in portions of one file each; each portion is
  explained between two runs of the bare model on it. The result is the median ratio.
- peak_mb: the peak resident memory of a `maskhooks explain` process, including page and plots, for two lengths of data
  (Linux).
- rows_lost, rows_doubled: after five SIGKILLs at random moments, each followed by a restart, against an uninterrupted
  run. different_files counts files that differ in any byte.

    MASKHOOKS_DATA=shared python benchmarks/explain_throughput.py [--texts 100000] [--quick]

MASKHOOKS_DATA is a folder with data/sst/train.txt and models/minilm-sst5; by default ../shared.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch

import maskhooks
from maskhooks.cli.material import Material
from maskhooks.data.records import Record, read
from maskhooks.explanations.chunks import Chunks
from maskhooks.model.task import Task

BATCH, BATCHES = 32, 32
PORTION = BATCH * BATCHES
FILES = {"batch_size": BATCH, "batches": BATCHES}
SMALL = {"batch_size": 8, "batches": 4}  # many files, so that kills hit every stage of writing one
KILLS = 5
# The process reports its own peak: measured from outside, it would include memory of the parent before the start.
MEASURED = """
import atexit, pathlib, sys
status = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: status.write_text(pathlib.Path("/proc/self/status").read_text()))
from maskhooks.cli import main
main()
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def texts_of(sentences: list[Record], count: int) -> list[str]:
    """The sentences in order; each repetition rotates their words by one more."""
    found = []
    for index in range(count):
        words = sentences[index % len(sentences)].text.split(" ")
        turn = index // len(sentences) % len(words)
        found.append(" ".join(words[turn:] + words[:turn]))
    return found


def write_texts(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([text] for text in texts)
    return path


def length(record: Record) -> int:
    return len(record.text)


class Bench:
    """A model, masks on its hidden states after a few steps, and a working folder."""

    def __init__(self, model: Path, sentences: list[Record], work: Path) -> None:
        self.model, self.sentences, self.work = str(model), sentences, work
        material = Material.of(self.model, "cpu")
        assert material.opened.batch is not None
        self.collate, self.hooked = material.opened.batch, material.hooked
        recipe = dataclasses.replace(maskhooks.Recipe(), statistics_batches=1, baseline_steps=0)
        batches = [self.collate(sentences[:8])]
        self.explainer = maskhooks.DiffMask(self.hooked, "hidden", recipe=recipe)
        self.explainer.fit(batches, steps=8, progress=False, accelerator="cpu")
        self.run = self.explainer.save(work / "run")

    def records(self, count: int) -> list[Record]:
        return [Record(text) for text in texts_of(self.sentences, count)]

    def bare(self, records: list[Record]) -> float:
        """CPU seconds of the model alone, on the batches of `explain_to`."""
        task: Task = self.hooked.task
        portions = Chunks(records, self.collate, BATCH, length, BATCHES, (0, 1))
        start = time.process_time()
        with torch.no_grad():
            for _, items in portions:
                for batch, _ in portions.made(items, 0):
                    task.call(self.hooked.model, batch)
        return time.process_time() - start

    def explain(self, records: list[Record], folder: Path, **batches: int) -> float:
        start = time.process_time()
        self.explainer.explain_to(
            records, folder, collate=self.collate, length=length, progress=False, **(FILES | batches)
        )
        return time.process_time() - start

    def cost(self, portions: int, size: int) -> dict[str, float]:
        records = self.records(portions * size)
        units, spent = [], []
        self.bare(records[:BATCH])
        for number in range(portions):
            chosen = records[number * size : (number + 1) * size]
            units.append(self.bare(chosen))
            spent.append(self.explain(chosen, self.work / f"cost-{number}"))
            units.append(self.bare(chosen))
            say(f"portion {number}: {spent[-1] * 2 / sum(units[-2:]):.3f} of the bare model")
        ratios = [
            2 * cost / (before + after) for cost, before, after in zip(spent, units[::2], units[1::2], strict=True)
        ]
        return {
            "cost": statistics.median(ratios),
            "cost_min": min(ratios),
            "cost_max": max(ratios),
            "examples_per_second": size / statistics.median(spent),
            "bare_examples_per_second": size / statistics.median(units),
        }

    def peak(self, count: int) -> dict[str, float]:
        """The peak memory of a command-line process, its seconds, and the size of its files."""
        data = write_texts(self.work / f"texts-{count}.csv", texts_of(self.sentences, count))
        out, status = self.work / f"out-{count}", self.work / "status"
        words = ["explain", str(self.run), self.model, "--data", str(data), "--out", str(out), "--device", "cpu"]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", MEASURED, str(status), *words], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        shards = maskhooks.Shards(out / "explanation.parquet")
        assert shards.complete
        assert shards.examples == count
        size = sum(path.stat().st_size for path in shards.folder.glob("*.parquet"))
        return {"peak_mb": int(peak) / 1024, "seconds": seconds, "mb_on_disk": size / 2**20}

    def kills(self, count: int, seed: int) -> dict[str, int]:
        """Compare rows after kills with those of an uninterrupted run; files are small, so there are many."""
        records, folders = self.records(count), (self.work / "alone", self.work / "killed")
        moments = random.Random(seed)
        begun = time.perf_counter()
        self.explain(records, folders[0], **SMALL)
        whole = time.perf_counter() - begun
        killed = 0
        while killed < KILLS:
            process = os.fork()
            if process == 0:
                self.explain(records, folders[1], **SMALL)
                os._exit(0)
            time.sleep(moments.uniform(0, whole / (KILLS + 2)))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            assert os.WIFSIGNALED(status), "it ended before it was killed"
            killed += 1
            files = len(maskhooks.Shards(folders[1])) if (folders[1] / "_manifest.json").exists() else 0
            say(f"kill {killed}: {files} files")
        self.explain(records, folders[1], **SMALL)
        keys = ["example", "site", "depth", "position"]
        alone, after = (pd.read_parquet(folder, columns=keys).astype({"site": str}) for folder in folders)
        left = after.drop_duplicates()
        names = {path.name for folder in folders for path in folder.glob("*.parquet")}
        different = [n for n in names if (folders[0] / n).read_bytes() != (folders[1] / n).read_bytes()]
        return {
            "kills": killed,
            "rows": len(alone),
            "rows_lost": len(alone.merge(left, how="left", indicator=True).query("_merge == 'left_only'")),
            "rows_doubled": len(after) - len(left),
            "different_files": len(different),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000, help="the larger number of texts; the smaller is a fifth")
    parser.add_argument("--portions", type=int, default=12, help=f"how many portions of {PORTION} texts to time")
    parser.add_argument("--seed", type=int, default=0, help="the random seed of the times of kills")
    parser.add_argument("--quick", action="store_true", help="few texts, under a minute")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = Path(os.environ.get("MASKHOOKS_DATA", Path(__file__).parent.parent.parent / "shared"))
    sentences = read(str(place / "data" / "sst" / "train.txt"))
    lengths = (64, 256) if given.quick else (given.texts // 5, given.texts)
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(place / "models" / "minilm-sst5", sentences, Path(work))
        result: dict[str, Any] = bench.kills(240 if given.quick else 4000, given.seed)
        say(f"after kills: {result}")
        result |= bench.cost(2 if given.quick else given.portions, 128 if given.quick else PORTION)
        say(f"cost {result['cost']:.3f}")
        peaks = {}
        for count in lengths:
            peaks[str(count)] = bench.peak(count)
            say(f"{count} texts: {peaks[str(count)]}")
    mb = [peak["peak_mb"] for peak in peaks.values()]
    result |= {"peak_mb": mb[-1], "peak_mb_ratio": mb[-1] / mb[0], "by_length": peaks}
    print(json.dumps({"benchmark": "explain_throughput", "quick": given.quick, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
