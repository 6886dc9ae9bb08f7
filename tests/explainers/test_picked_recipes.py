"""The recipe that a task picks for its model, where it is saved, and what wins over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch_geometric.nn import GCNConv

import maskhooks
from maskhooks import DiffMask, Hooked
from tests.adapters import test_transformers_families as families
from tests.adapters import transformers_models as texts

pytestmark = pytest.mark.usefixtures("unchecked")


def table(pattern: str = "batch feature -> batch feature, feature=4", **options: Any) -> Hooked:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return maskhooks.wrap(model, sites={"0:output": pattern}, output=categorical, **options)


def categorical(logits: Tensor) -> Categorical:
    return Categorical(logits=logits)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = GCNConv(4, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        result: Tensor = self.layer(x, edge_index)
        return result


@pytest.mark.parametrize(
    "pattern",
    [
        "batch token hidden -> batch token",
        "batch channel height width -> batch height width",
        "batch feature -> batch feature, feature=4",
    ],
)
def test_a_model_without_a_plugin(pattern: str) -> None:
    assert DiffMask(table(pattern)).recipe == maskhooks.Recipe.named("stable")


@pytest.mark.parametrize(
    ("family", "picked"), [("vit", "stable"), ("resnet", "stable"), ("wav2vec2", "stable"), ("longt5", "language")]
)
def test_transformers_by_their_heads(family: str, picked: str) -> None:
    assert DiffMask(maskhooks.wrap(families.make(family)), "hidden").recipe.name == picked


def test_texts_and_graphs() -> None:
    assert DiffMask(maskhooks.wrap(texts.make("bert"))).recipe.name == "language"
    hooked = maskhooks.wrap(Graph(), output=categorical)
    assert DiffMask(hooked, "message").recipe.name == "graph"


def test_the_pick_is_saved_and_a_named_recipe_wins(tmp_path: Path) -> None:
    hooked, batches = table(), [torch.randn(8, 4)]
    for folder, recipe in (("picked", None), ("named", "language")):
        explainer = DiffMask(hooked, margin=0.5, recipe=recipe)
        explainer.fit(batches, steps=2, accelerator="cpu", progress=False, run_dir=tmp_path / folder)
        saved = json.loads((tmp_path / folder / "explainer.json").read_text())
        assert saved["settings"]["recipe"]["name"] == (recipe or "stable")
        assert maskhooks.load(tmp_path / folder, hooked).recipe == maskhooks.Recipe.named(recipe or "stable")


def test_what_is_optimised_for_each_batch() -> None:
    hooked = maskhooks.wrap(texts.make("bert"))
    assert DiffMask(hooked, "input", amortized=False).recipe.name == "stable"
