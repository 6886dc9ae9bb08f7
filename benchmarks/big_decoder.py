"""The cost of a DiffMask step on a decoder of a billion parameters in bfloat16: time and memory, on a GPU.

The decoder is built from its configuration, with random weights: 16 layers of 2048 units, 1.1 billion parameters. Each
step is timed through `fit`, from one batch to the next, between bare passes of the same model on the same batch: one
forward without gradients, and `both`, forward and backward to the word embeddings with frozen weights. Results are
medians; peaks are PyTorch's allocations beyond the weights.

Without a GPU a decoder of four small layers runs on the CPU, as with `--quick`, and the result says so.

    python benchmarks/big_decoder.py [--quick]
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
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import maskhooks

GPU = torch.cuda.is_available()
BIG = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def decoder(sizes: dict[str, int], device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"] // 4, vocab_size=32000)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Costs:
    """Seconds and peaks of repeated measurements."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def begin(self) -> None:
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        self.begun = now()

    def end(self) -> None:
        self.seconds.append(now() - self.begun)
        self.peaks.append(torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0)

    def last(self, count: int, weights: float) -> dict[str, float | None]:
        peak = statistics.median(self.peaks[-count:]) - weights if GPU else None
        return {"seconds": statistics.median(self.seconds[-count:]), "peak_gib": peak}


class Batch(dict[str, Tensor]):
    """A batch that measures the steps that use it, and the bare passes between steps."""

    def __init__(self, ids: Tensor, model: Any) -> None:
        super().__init__(input_ids=ids)
        self.model, self.taken = model, False
        self.forward, self.both, self.step = Costs(), Costs(), Costs()

    def to(self, device: torch.device) -> Batch:
        """Called by each step."""
        if self.taken:
            self.step.end()
        self.forward.begin()
        with torch.no_grad():
            self.model(self["input_ids"], use_cache=False)
        self.forward.end()
        self.both.begin()
        words = self.model.get_input_embeddings()(self["input_ids"]).detach().requires_grad_()
        with torch.enable_grad():
            self.model(inputs_embeds=words, use_cache=False).logits[:, -1].float().logsumexp(-1).sum().backward()
        self.both.end()
        del words
        self.taken = True
        self.step.begin()
        return self


def measured(hooked: maskhooks.Hooked, ids: Tensor, steps: int, weights: float, **what: Any) -> dict[str, Any]:
    batch = Batch(ids, hooked.model)
    recipe = dataclasses.replace(maskhooks.Recipe(), statistics_batches=1, baseline_steps=2)  # not measured
    explainer = maskhooks.DiffMask(hooked, recipe=recipe, **what)
    explainer.fit([batch], steps=steps + 2, progress=False, accelerator="cuda" if GPU else "cpu", devices=1)
    found: dict[str, Any] = {name: getattr(batch, name).last(steps, weights) for name in ("forward", "both", "step")}
    for name in ("forward", "both"):
        found[f"step_over_{name}"] = found["step"]["seconds"] / found[name]["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small decoder and few steps, within a minute")
    quick = parser.parse_args().quick or not GPU
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if GPU else "cpu")
    model = decoder(SMALL if quick else BIG, device)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**30
    size, length, steps = (2, 32, 5) if quick else (8, 512, 15)
    ids = torch.randint(3, 1000, (size, length), generator=torch.Generator().manual_seed(0)).to(device)
    hooked = maskhooks.wrap(model)
    hidden = hooked.sites.tagged("hidden")
    asked: dict[str, Any] = {"input": {"sites": [hidden[0]], "conditioned_on": hidden}}
    asked |= {str(site): {"sites": [site]} for site in (hidden[0], hidden[len(hidden) // 2], hidden[-1])}
    costs = {}
    for name, what in asked.items():
        costs[name] = measured(hooked, ids, steps, weights, **what)
        print(f"{name}: {costs[name]}", file=sys.stderr, flush=True)
    about = {"benchmark": "big_decoder", "quick": quick, "gpu": torch.cuda.get_device_name() if GPU else None}
    about |= {"note": "" if GPU else "there was no GPU: a small decoder ran on the CPU", "torch": torch.__version__}
    about |= {"parameters": sum(weight.numel() for weight in model.parameters()), "weights_gib": weights}
    print(json.dumps({**about, "batch": size, "length": length, "costs": costs}))


if __name__ == "__main__":
    main()
