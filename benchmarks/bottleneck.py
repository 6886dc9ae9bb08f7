"""Information bottlenecks (Schulz et al. 2020; Jiang et al. 2020): bits by layer, and what replay saves.

The small BERT of `$MASKHOOKS_DATA/models/minilm-sst5` on sentences of `$MASKHOOKS_DATA/data/sst` (default ../shared).
The noise has the statistics of training sentences; explained are sentences of dev, with the published settings: ten
steps of Adam at a rate of 1, ten copies of each sentence, beta 1e-5. `sst_capacity_by_layer` is the capacity at the
output of each layer, in bits per token, with the standard deviation over sentences in `sst_capacity_spread`; `monotone`
is the share of sentences whose total falls from each layer to the next. `cost_over_plain` compares `IBA` at two thirds
of the depth with the same procedure as published: a full pass of ten copies in each step, in one process, interleaved,
medians. `gaussian_kl_error` is the largest difference from numerical integration, in nats. `readout` compares `Readout`
with `IBA` at the same layer and price: bits per token of each, the mean rank correlation of their scores over a
sentence's tokens, and the seconds of an explanation. At the published price hardly anything is squeezed out, so
`higher_price` has the same figures at a beta of 10, the capacity for the first 60 sentences.

    python benchmarks/bottlenecks.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

if __name__ != "__main__":  # pandas takes a module of this name for a library that makes it faster
    raise ImportError("this is a benchmark: python benchmarks/bottleneck.py")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor

import maskhooks
from maskhooks.data import sst
from maskhooks.errors import MaskhooksWarning
from maskhooks.masks.bottleneck import gaussian_kl
from maskhooks.progress import track

BETA, HIGHER, STEPS, COPIES = 1e-5, 10.0, 10, 10

Batch = dict[str, Tensor]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def kl_error() -> float:
    """The largest difference of the closed form from numerical integration, in nats, for |mean| <= 5."""
    worst = 0.0
    for mean in np.linspace(-5, 5, 21):
        for log_variance in np.linspace(-10, 1, 23):
            deviation = np.exp(log_variance / 2)
            x = mean + deviation * np.linspace(-12, 12, 20001)
            log_p = -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation)
            log_q = -0.5 * x**2
            density = np.exp(log_p) / np.sqrt(2 * np.pi)
            found = np.trapezoid(density * (log_p - log_q), x)
            closed = gaussian_kl(torch.tensor([mean]), torch.tensor([log_variance])).item()
            worst = max(worst, abs(found - closed))
    return worst


def plain(model: Any, layer: torch.nn.Module, batch: Batch, mean: Tensor, deviation: Tensor) -> Tensor:
    """The published procedure: a hook mixes noise in, and each step runs the whole model on ten copies."""
    state: dict[str, Tensor] = {}

    def hook(module: Any, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        z = torch.sigmoid(state["alpha"])
        noise = mean + deviation * torch.randn_like(value)
        state["capacity"] = gaussian_kl(
            z * (value[:1] - mean) / deviation, (2 * torch.log1p(-z.clamp(max=1 - 1e-6))).clamp(min=-10)
        )
        mixed = z * value + (1 - z) * noise
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    with torch.no_grad():
        target = model(**batch).logits.argmax(-1)
    copies = {name: one.repeat(COPIES, 1) for name, one in batch.items()}
    tokens = batch["input_ids"].shape[1]
    state["alpha"] = torch.full((1, tokens, len(mean)), 5.0, requires_grad=True)
    optimizer = torch.optim.Adam([state["alpha"]], lr=1.0)
    handle = layer.register_forward_hook(hook)
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(**copies).logits, target.expand(COPIES))
            (loss + BETA * state["capacity"].mean()).backward()
            optimizer.step()
    finally:
        handle.remove()
    return state["capacity"].detach().sum(-1)


def cost(
    model: Any, hooked: maskhooks.Hooked, train: list[Batch], batches: list[Batch], repeats: int
) -> dict[str, Any]:
    """The seconds of an explanation, ours and as published, at two thirds of the depth."""
    layers = model.config.num_hidden_layers
    number = round(2 * layers / 3) - 1
    ours = maskhooks.IBA(hooked, f"*encoder.layer.{number}:output", beta=BETA).fit(train, progress=False)
    (noise,) = ours.parts
    layer = model.bert.encoder.layer[number]
    frozen = {weight: weight.requires_grad for weight in model.parameters()}
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for batch in track(batches[:repeats], "comparing with the published procedure"):
        for name in ("ours", "plain"):
            begun = time.perf_counter()
            if name == "ours":
                ours.explain(batch)
            else:
                for weight in frozen:
                    weight.requires_grad_(False)
                plain(model, layer, batch, noise(), noise.deviation)
                for weight, flag in frozen.items():
                    weight.requires_grad_(flag)
            times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    return {"cost_over_plain": medians["ours"] / medians["plain"], "seconds": medians, "layer": number}


def readout(
    hooked: maskhooks.Hooked,
    train: list[Batch],
    held: list[Batch],
    batches: list[Batch],
    *,
    site: str,
    steps: int,
    beta: float,
) -> dict[str, Any]:
    """`Readout` beside `IBA`: bits per token, rank correlation over tokens, seconds of an explanation."""
    begun = time.perf_counter()
    amortised = maskhooks.Readout(hooked, site, beta=beta, recipe={"name": "readout", "steps": steps})
    amortised.fit(train, held, progress=False)
    fitted = time.perf_counter() - begun
    iba = maskhooks.IBA(hooked, site, beta=beta).fit(train, progress=False)
    correlations: list[float] = []
    bits: dict[str, list[float]] = {"readout": [], "iba": []}
    seconds: dict[str, list[float]] = {"readout": [], "iba": []}
    for batch in track(batches, "comparing the readout with single explanations"):
        found = {}
        for name, explainer in (("readout", amortised), ("iba", iba)):
            begun = time.perf_counter()
            found[name] = explainer.explain(batch)["score"]
            seconds[name].append(time.perf_counter() - begun)
            bits[name].append(float(found[name].mean()))
        correlations.append(float(spearmanr(found["readout"], found["iba"]).statistic))
    return {
        "fit_seconds": fitted,
        "rank_correlation": statistics.mean(correlations),
        "bits_per_token": {name: statistics.mean(one) for name, one in bits.items()},
        "seconds": {name: statistics.median(one) for name, one in seconds.items()},
    }


def capacities(hooked: maskhooks.Hooked, train: list[Batch], batches: list[Batch], *, beta: float) -> dict[str, Any]:
    """The capacity of each layer's output."""
    config: Any = hooked.model.config
    outputs = [f"*encoder.layer.{number}:output" for number in range(config.num_hidden_layers)]
    iba = maskhooks.IBA(hooked, outputs, beta=beta).fit(train, progress=False)
    totals, per_token = [], []
    for batch in track(batches, "explaining sentences at every layer"):
        rows = iba.explain(batch)
        depths = sorted(set(rows["depth"].tolist()))
        found = [rows["score"][(rows["depth"] == depth) & rows["valid"]] for depth in depths]
        totals.append([float(one.sum()) for one in found])
        per_token.append([float(one.mean()) for one in found])
    bits, sums = np.array(per_token), np.array(totals)
    return {
        "sst_capacity_by_layer": bits.mean(0).tolist(),
        "sst_capacity_spread": bits.std(0).tolist(),
        "monotone": float((np.diff(sums, axis=1) < 0).all(1).mean()),
        "falling_steps": (np.diff(sums, axis=1) < 0).mean(0).tolist(),
        "sentences": len(batches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sentences, under a minute")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    transformers.logging.set_verbosity_error()
    home = Path(os.environ.get("MASKHOOKS_DATA", "../shared"))
    path = home / "models" / "minilm-sst5"
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def texts(part: str, count: int) -> list[str]:
        return [one.text for one in sst.read(home / "data" / "sst" / f"{part}.txt")][:count]

    def encoded(sentences: list[str]) -> Batch:
        return dict(tokenizer(sentences, padding=True, return_tensors="pt"))

    few = given.quick
    learned = texts("train", 64 if few else 960)
    train = [encoded(learned[k : k + 32]) for k in range(0, len(learned), 32)]
    batches = [encoded([text]) for text in texts("dev", 4 if few else 200)]
    hooked = maskhooks.wrap(model)
    result = {
        "benchmark": "bottleneck",
        "quick": few,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gaussian_kl_error": kl_error(),
        **cost(model, hooked, train, batches, 3 if few else 25),
        **capacities(hooked, train, batches, beta=BETA),
    }
    held = [encoded(texts("train", 1216)[k : k + 32]) for k in range(960, 1216, 32)]
    compared: dict[str, Any] = {
        "site": f"*encoder.layer.{result['layer']}:output",
        "held": held[: 2 if few else 8],
        "steps": 20 if few else 400,
    }
    result["readout"] = readout(hooked, train, batches=batches, beta=BETA, **compared)
    result["higher_price"] = {
        "beta": HIGHER,
        **capacities(hooked, train, batches[:60], beta=HIGHER),
        "readout": readout(hooked, train, batches=batches, beta=HIGHER, **compared),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
