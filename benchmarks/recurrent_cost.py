"""The cost of gates on the states of a GRU: the forward step by step, and its gradients.

`forward_N`: a forward with gates on every state, hidden size N, over the fused one; each opens and closes a tap.
`forward_64_within`: the same inside a tap that stays open. `backward_768`: forward and backward to the gates, over the
same with gates on the fused module's inputs. One thread, length 25, batch 32, median ratios of alternating runs.

    python benchmarks/recurrent_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

import maskhooks
from maskhooks.hooks.port import Replacement
from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.model.hooked import Hooked
from maskhooks.sites.places import Places

BATCH, LENGTH = 32, 25


def spent(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(run: Callable[[], object], unit: Callable[[], object], repeats: int) -> float:
    """The median cost of a run over the mean of the units before and after it, so that the machine's drift cancels."""
    for warm in (run, unit, run, unit):
        warm()
    units, costs = [spent(unit)], []
    for _ in range(repeats):
        costs.append(spent(run))
        units.append(spent(unit))
    around = [(before + after) / 2 for before, after in itertools.pairwise(units)]
    return statistics.median(cost / one for cost, one in zip(costs, around, strict=True))


def gated(hooked: Hooked, address: str, x: Tensor) -> tuple[Masking, Tensor, Tensor]:
    """A masking of one site, its value in a clean pass, and a sample of its gates."""
    site = hooked.sites[address]
    with torch.no_grad(), hooked.tap(read=site) as tap:
        hooked(x)
    value = tap.values[address]
    baseline = Learned()
    baseline.start((value.shape[-1],))
    sample = HardConcrete().sample(torch.zeros(value.shape[:2]), torch.Generator().manual_seed(0))
    return Masking(site, 0, [], HardConcrete(), baseline), value, sample


def forward(size: int, repeats: int, *, within: bool = False) -> float:
    x = torch.randn(BATCH, LENGTH, size)
    hooked = maskhooks.wrap(nn.GRU(size, size, batch_first=True))
    masking, value, sample = gated(hooked, "h_l0:output", x)
    valid = torch.ones(value.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        onto = masking.replacement(masking.mask(value, Places(valid), sample))

        def fused() -> None:
            with torch.no_grad():
                hooked(x)

        def tapped() -> None:
            with hooked.tap(replace={"h_l0:output": onto}):
                fused()

        if not within:
            return ratio(tapped, fused, repeats)
        return statistics.median(_within(hooked, onto, fused) for _ in range(repeats))


def _within(hooked: Hooked, onto: Replacement, fused: Callable[[], object], passes: int = 5) -> float:
    """The cost of a forward inside an open tap, over those before and after it."""
    before = sum(spent(fused) for _ in range(passes))
    with hooked.tap(replace={"h_l0:output": onto}):
        cost = sum(spent(fused) for _ in range(passes))
    return cost / ((before + sum(spent(fused) for _ in range(passes))) / 2)


def backward(size: int, repeats: int) -> float:
    x = torch.randn(BATCH, LENGTH, size)
    hooked = maskhooks.wrap(nn.GRU(size, size, batch_first=True))

    def learn(address: str) -> Callable[[], None]:
        masking, value, sample = gated(hooked, address, x)
        valid = torch.ones(value.shape[:2], dtype=torch.bool)

        def run() -> None:
            leaf = sample.clone().requires_grad_()
            onto = masking.replacement(masking.mask(value, Places(valid), leaf))
            with hooked.tap(replace={address: onto}):
                hooked(x)[0].square().mean().backward()

        return run

    return ratio(learn("h_l0:output"), learn("inputs:output"), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {}
    for name, run in (("forward_64", lambda n: forward(64, 4 * n)), ("forward_768", lambda n: forward(768, n))):
        result[name] = run(10 if quick else 100)
        print(f"{name} {result[name]:.3f}", file=sys.stderr, flush=True)
    result["forward_64_within"] = forward(64, 20 if quick else 200, within=True)
    print(f"forward_64_within {result['forward_64_within']:.3f}", file=sys.stderr, flush=True)
    result["backward_768"] = backward(768, 5 if quick else 50)
    print(f"backward_768 {result['backward_768']:.3f}", file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "recurrent_cost", "quick": quick, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
