"""The speed of exact erasure over all sets of positions of a GRU's input.

A GRU of 64 units with a linear head, one sentence of 20 positions; no set counts as a solution, so all 2^20 are tried.
`subsets_per_second`: sets per second of the search itself, a tree in which sets with a common prefix share states,
through the library: states, head, distribution, criterion. `over_flat`: speed-up over plain torch that runs each set
through embedded inputs, nn.GRU and head, at its best chunk size. One thread, medians of alternating runs; `peak_mb` is
the additional peak memory of the process while it searches.

    python benchmarks/search_speed.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.explainers.erasure import Erasure
from maskhooks.model.outputs import Outputs, agreement
from maskhooks.search.subsets import total, unrank

HIDDEN, POSITIONS, CLASSES, VOCABULARY = 64, 20, 5, 100
CHUNKS = (64, 256, 1024, 4096)


class Reader(nn.Module):
    """Embeddings, a GRU, and a linear layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.rnn = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, ids: Tensor) -> Categorical:
        return Categorical(logits=self.head(self.rnn(self.embed(ids))[1][-1]))


def never(original: Outputs, masked: Outputs) -> Tensor:
    """Compare the predictions, but accept none as unchanged."""
    return agreement(original, masked) * 0.5


def spent(run: Callable[[], int]) -> float:
    """Sets per second of process time."""
    start = time.process_time()
    count = run()
    return count / (time.process_time() - start)


def flat(model: Reader, ids: Tensor, chunk: int, sets: int) -> Callable[[], int]:
    """Run this many sets of half the positions through nn.GRU."""
    embedded = model.embed(ids).detach()

    def run() -> int:
        with torch.no_grad():
            original = model.head(model.rnn(embedded)[1][-1]).argmax(-1)
            for begin in range(0, sets, chunk):
                numbers = torch.arange(begin, begin + chunk) % total(POSITIONS, POSITIONS // 2)
                kept = unrank(numbers, POSITIONS, POSITIONS // 2)
                _, last = model.rnn(embedded * kept[..., None])
                (model.head(last[-1]).argmax(-1) == original).any()
        return sets

    return run


def peak() -> float:
    """The peak memory of the process so far, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if platform.system() == "Darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, ids = Reader(), torch.randint(VOCABULARY, (1, POSITIONS))
    hooked = maskhooks.wrap(model)
    erasure = Erasure(hooked, "rnn.inputs:output", criterion=never)

    def search() -> int:
        (found,) = erasure.search(ids, progress=False)
        assert found.tried == total(POSITIONS)
        return found.tried

    before = peak()
    search()
    memory = peak() - before
    sets = 2**12 if quick else 2**14
    rates = {chunk: spent(flat(model, ids, chunk, sets)) for chunk in CHUNKS for _ in range(2)}  # the first warms up
    best = max(rates, key=lambda chunk: rates[chunk])
    shared, alone = [], []
    for repeat in range(3 if quick else 15):
        shared.append(spent(search))
        alone.append(spent(flat(model, ids, best, sets)))
        print(f"{repeat}: {shared[-1]:,.0f} and {alone[-1]:,.0f} sets per second", file=sys.stderr, flush=True)
    result = {
        "subsets_per_second": statistics.median(shared),
        "over_flat": statistics.median(one / other for one, other in zip(shared, alone, strict=True)),
        "peak_mb": memory,
        "flat_per_second": statistics.median(alone),
        "flat_chunk": best,
    }
    print(json.dumps({"benchmark": "search_speed", "quick": quick, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
