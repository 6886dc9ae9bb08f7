"""IBA and Schulz against a plain loop over the published formulas (Schulz et al. 2020; Jiang et al. 2020)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from maskhooks import IBA, Recipe, Schulz
from maskhooks.explainers.bottlenecked import Bottlenecked
from maskhooks.seeds import generator
from maskhooks.training.per_example import _EXPLAIN
from tests.masks.test_masking import Tagger
from tests.training.tagger_fits import SITES, batches, wrapped

STEPS, COPIES, BETA = 6, 3, 0.7


def plainly(
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer], per_unit: bool, copies: int
) -> tuple[Tensor, Tensor]:
    """The gates and the capacity in bits, `batch token`, after a loop of full passes of the model."""
    model, data = Tagger().eval(), batches(3)

    def states(ids: Tensor) -> Tensor:
        return torch.tanh(model.layers[0](model.embedding(ids)))

    def after(state: Tensor, valid: Tensor) -> Tensor:
        for layer in model.layers[1:]:
            state = torch.tanh(layer(state))
        return 3 * model.head((state * valid[..., None]).sum(1) / valid.sum(1, keepdim=True))

    # the site is the output of the linear layer, before tanh
    def linear(ids: Tensor) -> Tensor:
        return model.layers[0](model.embedding(ids))

    with torch.no_grad():
        seen = torch.cat([linear(ids)[valid] for ids, valid in data])
        mean, deviation = seen.mean(0), seen.std(0, unbiased=False).clamp(min=0.01)
        ids, valid = data[0]
        held = linear(ids)
        target = after(torch.tanh(held), valid).argmax(-1)
    alpha = torch.full(held.shape if per_unit else held.shape[:2], 5.0, requires_grad=True)
    made = optimizer([alpha])

    def gates() -> Tensor:
        z = torch.sigmoid(alpha)
        return z if per_unit else z[..., None].expand_as(held)

    def capacity() -> Tensor:
        z = gates()
        log_variance = (2 * (1 - z).log()).clamp(min=-10)
        return 0.5 * (log_variance.exp() + (z * (held - mean) / deviation) ** 2 - 1 - log_variance)

    for step in range(STEPS):
        noise = torch.randn(copies * len(held), *held.shape[1:], generator=generator(0, _EXPLAIN, 0, 0, step))
        z, many = gates().repeat(copies, 1, 1), valid.repeat(copies, 1)[..., None]
        noisy = z * held.repeat(copies, 1, 1) + (1 - z) * (mean + deviation * noise)
        mixed = torch.where(many, noisy, held.repeat(copies, 1, 1))
        logits = after(torch.tanh(mixed), valid.repeat(copies, 1))
        loss = -logits.log_softmax(-1).gather(1, target.repeat(copies)[:, None]).view(copies, -1).mean(0)
        information = (capacity() * valid[..., None]).sum((1, 2)) / (valid.sum(1) * held.shape[-1])
        made.zero_grad()
        (loss + BETA * information).sum().backward()
        made.step()
    with torch.no_grad():
        return gates().mean(-1), capacity().sum(-1) / math.log(2)


def explained(kind: type[Bottlenecked], name: str, **changes: Any) -> tuple[Any, Tensor]:
    recipe = dataclasses.replace(Recipe.named(name), steps=STEPS, **changes)
    explainer = kind(wrapped(), SITES[1], beta=BETA, recipe=recipe)  # type: ignore[call-arg]
    explainer.fit(batches(3), progress=False)
    explanation = explainer.explain(batches(3)[0])
    valid = batches(3)[0][1]
    return torch.from_numpy(explanation["score"]).view(valid.shape), valid


@pytest.mark.parametrize("copies", [1, COPIES])
def test_iba(copies: int) -> None:
    found, valid = explained(IBA, "iba", samples=copies)
    _, bits = plainly(lambda weights: torch.optim.Adam(weights, lr=1.0), True, copies)
    torch.testing.assert_close(found[valid], bits[valid], rtol=1e-3, atol=1e-3)
    assert found[valid].std() > 0.1


def test_schulz() -> None:
    def rmsprop(weights: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(weights, lr=0.1, centered=True)

    found, valid = explained(Schulz, "schulz")
    gates, _ = plainly(rmsprop, False, 1)
    torch.testing.assert_close(found[valid], gates[valid], rtol=1e-3, atol=1e-3)
    assert found[valid].max() < 0.99
