"""Steps: training through activation checkpointing comes to the numbers of the model without it, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.errors import GradientError
from maskhooks.passes.clean_cache import CleanCache
from tests.conftest import fingerprint, same_bits

# PyTorch's own, of a pass without gradients, as clean ones are
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

PATTERN = "batch token hidden -> batch token"
SITES = ["embed:output", "layers.0:output", "layers.1.a:output", "shared@1:output", "layers.2:input"]
QUICK = dataclasses.replace(Recipe(), steps=4, baseline_steps=2, warmup_steps=2, validations=2)
BATCHES = [torch.randint(0, 20, (3, 4), generator=Generator().manual_seed(seed)) for seed in range(2)]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.b(torch.tanh(self.a(x)))
        return result


class Stack(nn.Module):
    """Three layers, each followed by a shared one; those of `apart` begin and end where segments of layers do."""

    def __init__(self, how: str | None, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.apart = how, apart
        self.embed, self.shared, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def segment(self, x: Tensor, *layers: nn.Module) -> Tensor:
        for layer in layers:
            x = torch.tanh(self.shared(layer(x)))
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layers in [[layer] for layer in self.layers] if self.apart else [list(self.layers)]:
            if self.how is None:
                x = self.segment(x, *layers)
            else:
                x = checkpoint(self.segment, x, *layers, use_reentrant=self.how == "reentrant")
        result: Tensor = self.head(x.mean(1))
        return result


def explainer(how: str | None, apart: bool, sites: Any, **settings: Any) -> DiffMask:
    sites = dict.fromkeys(SITES, PATTERN) if isinstance(sites, str) else dict.fromkeys(sites, PATTERN)
    hooked = maskhooks.wrap(Stack(how, apart), sites=sites, output=lambda logits: Categorical(logits=3 * logits))
    recipe = dataclasses.replace(QUICK, replay=settings.pop("replay", True))
    return DiffMask(hooked, list(sites), margin=0.5, recipe=recipe, **settings)


def learned(made: DiffMask) -> list[Tensor]:
    return [tensor for part in made.parts for tensor in part.state_dict().values()]


@pytest.mark.parametrize(
    ("apart", "replay", "stored"), [(False, False, False), (False, True, True), (True, True, False)]
)
def test_fit_is_the_fit_without_checkpointing(apart: bool, replay: bool, stored: bool) -> None:
    found = []
    for how in (None, "not reentrant"):
        made = explainer(how, apart, SITES, replay=replay)
        before = fingerprint(made.hooked.model)
        cache = CleanCache(dtype=torch.bfloat16) if stored else None
        made.fit(BATCHES, BATCHES[:1], accelerator="cpu", progress=False, cache=cache)
        assert fingerprint(made.hooked.model) == before
        found.append(learned(made))
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("how", ["not reentrant", "reentrant"])
def test_free_gates_are_those_without_checkpointing(how: str) -> None:
    found = []
    sites = SITES[:1] if how == "reentrant" else SITES
    for kind in (None, how):
        made = explainer(kind, True, sites, amortized=False)
        before = fingerprint(made.hooked.model)
        found.append(made.explain(BATCHES[0])["score"].tolist())
        assert fingerprint(made.hooked.model) == before
    assert found[0] == found[1]


@pytest.mark.parametrize("given", [False, True])
def test_a_site_before_reentrant_checkpointing(given: bool) -> None:
    """With `given` a baseline is fitted first, by a backward pass of its own."""
    found = []
    for how in (None, "reentrant"):
        made = explainer(how, True, SITES[:1], **({"conditioned_on": SITES[:1]} if given else {}))
        found.append(learned(made.fit(BATCHES, accelerator="cpu", progress=False)))
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_a_site_inside_reentrant_checkpointing_is_refused_before_training() -> None:
    made = explainer("reentrant", True, SITES[1:2])
    before = fingerprint(made.hooked.model)
    with pytest.raises(GradientError, match=r"use_reentrant=False.* Mask a later site"):
        made.fit(BATCHES, accelerator="cpu", progress=False)
    assert fingerprint(made.hooked.model) == before
