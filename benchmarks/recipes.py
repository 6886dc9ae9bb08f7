"""Recipes on small models of tables and images: masked fraction, divergence, agreement and seconds of each.

Data sets are those that scikit-learn ships: breast cancer and wine as tables, digits as a table and as images. Each
model is trained here, within seconds. Two sites of each are masked within a margin of .1 nats. Masks are learned on the
examples that the model was trained on; a fifth of the data chooses the checkpoint, another fifth measures it. Seconds
are processor time of the fit. Each seed has its own split, model and masks.

    pip install maskhooks[bench]
    python benchmarks/recipes.py [--quick] [--seeds 2] [--tasks cancer,digits-cnn] [--recipes stable,faster]

Tasks: a network of two hidden layers on a table (`cancer`, `wine`, `digits`), masked at its features and at the units
of its second hidden layer, the probe reading all of them; `-each`: a gate of the same networks reads one feature alone;
`digits-cnn`, a CNN masked at its pixels and its last feature map; `digits-vit`, a ViT masked at its patches and the
input of its first layer. The recipe "faster" is one that was tried: see `FASTER`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sklearn
import torch
import torch.nn.functional as F
import transformers
from sklearn import datasets
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.errors import MaskhooksWarning

MARGIN = 0.1
FASTER = dataclasses.replace(
    Recipe.named("stable"),
    name="faster",
    steps=300,
    objective={"name": "ratio", "rate": 0.01, "ema_decay": 0.95},
    baseline_learning_rate=0.01,
)
FEATURES = "batch feature -> batch feature"
PLACES = "batch channel height width -> batch height width"


class Setup(NamedTuple):
    """A trained model with sites, and its data: for training, validation and test."""

    hooked: Any
    parts: list[Any]
    accuracy: float


class CNN(nn.Module):
    """Three convolutions of 3 x 3; the second one's maps are pooled."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        x = F.relu(self.conv3(F.max_pool2d(x, 2)))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits


def table(name: str) -> tuple[Tensor, Tensor]:
    """Standardised features and classes."""
    found = {"cancer": datasets.load_breast_cancer, "wine": datasets.load_wine, "digits": datasets.load_digits}[name]()
    x = torch.tensor(found.data).float()
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6), torch.tensor(found.target)


def images() -> tuple[Tensor, Tensor]:
    """Standardised images of 8 x 8 pixels, and classes."""
    found = datasets.load_digits()
    x = torch.tensor(found.images).float()[:, None]
    return (x - x.mean()) / x.std(), torch.tensor(found.target)


def trained(name: str, seed: int) -> Setup:
    """Train one model, and hook it."""
    data, _, kind = name.partition("-")
    x, y = images() if kind in ("cnn", "vit") else table(data)
    classes = int(y.max()) + 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = [int(0.6 * len(x)), int(0.8 * len(x))]
    splits = [order[: cut[0]], order[cut[0] : cut[1]], order[cut[1] :]]
    torch.manual_seed(seed)
    model: Any
    sites: dict[str, str] = {}
    if kind == "cnn":
        model = CNN(x.shape[1], classes)
        sites = {":input": PLACES, "conv3:output": PLACES}
    elif kind == "vit":
        config = ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=8,
            patch_size=2, num_channels=1, num_labels=classes,
        )  # fmt: skip
        model = ViTForImageClassification(config)
    else:
        norm = nn.LayerNorm(64) if data == "digits" else nn.Identity()
        model = nn.Sequential(
            nn.Linear(x.shape[1], 64), norm, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
        )
        sizes = {":input": x.shape[1], "4:output": 64}
        sites = {site: FEATURES if kind == "each" else f"{FEATURES}, feature={size}" for site, size in sizes.items()}
    call = (lambda images: model(pixel_values=images).logits) if kind == "vit" else model
    # Without label smoothing, models of images are so sure of training images that no recipe ends within the margin.
    steps, rate, smoothing = {"cnn": (400, 1e-2, 0.05), "vit": (400, 3e-3, 0.05)}.get(kind, (150, 3e-3, 0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        rows = splits[0][torch.randint(len(splits[0]), (64,))]
        loss = F.cross_entropy(call(x[rows]), y[rows], label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (call(x[splits[2]]).argmax(-1) == y[splits[2]]).float().mean().item()
    if kind == "vit":
        hooked = maskhooks.wrap(model)
        parts = [
            [{"pixel_values": one, "labels": label} for one, label in zip(x[s], y[s], strict=True)] for s in splits
        ]
    else:
        hooked = maskhooks.wrap(model, sites=sites, output=lambda logits: Categorical(logits=logits))
        parts = [TensorDataset(x[s], y[s]) for s in splits]
    return Setup(hooked, parts, accuracy)


def measure(name: str, seed: int, setup: Setup, recipe: Recipe, steps: int | None = None) -> dict[str, Any]:
    """Learn the masks of two sites, and measure them."""
    train, validation, test = (
        DataLoader(part, recipe.batch_size if not n else 128, shuffle=not n) for n, part in enumerate(setup.parts)
    )
    begun = time.process_time()
    explainer = DiffMask(setup.hooked, setup.hooked.sites.tagged("hidden")[:2], margin=MARGIN, recipe=recipe, seed=seed)
    explainer.fit(train, validation, steps=steps, progress=False)
    seconds = time.process_time() - begun
    rows = explainer.evaluate(test, progress=False)
    return {
        "task": name,
        "seed": seed,
        "recipe": recipe.name,
        "accuracy": setup.accuracy,
        "within_margin": explainer.within_margin,
        "seconds": seconds,
        "sites": {
            row["site"]: {
                "masked": 1 - row["expected_l0"],
                "nats": row["divergence"],
                "rounded_masked": 1 - row["rounded_kept"],
                "rounded_nats": row["rounded_divergence"],
                "rounded_agreement": row["rounded_agreement"],
            }
            for row in rows
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks, one seed and few steps, under a minute")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", default="cancer,digits,digits-cnn,digits-vit")
    parser.add_argument("--recipes", default="stable,faster,language")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MaskhooksWarning)
    rows = []
    for task in ["cancer", "digits-cnn"] if given.quick else given.tasks.split(","):
        for seed in range(1 if given.quick else given.seeds):
            setup = trained(task, seed)
            for recipe in given.recipes.split(","):
                chosen = FASTER if recipe == "faster" else Recipe.named(recipe)
                rows.append(measure(task, seed, setup, chosen, 20 if given.quick else None))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "scikit-learn": sklearn.__version__}
    print(json.dumps({"benchmark": "recipes", "quick": given.quick, **about, "rows": rows}))


if __name__ == "__main__":
    main()
