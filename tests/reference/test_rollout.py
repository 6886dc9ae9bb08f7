"""Attention and rollout against the formulas, number by number, in float64 (Abnar & Zuidema 2020, section 3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Attention, Hooked, Rollout

LENGTHS, WIDTH, HEADS, LAYERS = (5, 3, 1, 4), 5, 3, 3
Array = npt.NDArray[np.float64]


def hooked(*, causal: bool, left: bool) -> tuple[Hooked, Array]:
    """A model with random attention weights, and the weights; rows of padding are as odd as a model may make them."""
    valid = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    valid = valid.flip(1) if left else valid
    scores = 2 * torch.randn(LAYERS, len(LENGTHS), HEADS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    seen = (
        valid[:, None, None, :] & torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril() if causal else valid[:, None, None]
    )
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)  # nan where a query sees nothing
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(LAYERS)), nn.Flatten())
    found = maskhooks.wrap(
        model,
        sites={f"{layer}:input": "batch token hidden -> batch token" for layer in range(LAYERS)},
        output=lambda logits: Categorical(logits=logits),
        call=lambda model, batch: model(torch.ones(len(LENGTHS), WIDTH, 2)),
        valid=lambda batch: valid,
        attention=lambda model, batch: list(weights),
    )
    return found, weights.double().numpy()


def rollout(weights: Array, positions: list[int], residual: float, query: int | None) -> list[float]:
    """The share of each of an example's positions, for a query or the mean over them, all by loops."""
    flow = [[float(i == j) for j in positions] for i in positions]
    for layer in weights:
        mixed = []
        for i in positions:
            row = [
                residual * (i == j) + (1 - residual) * sum(layer[head, i, j] for head in range(HEADS)) / HEADS
                for j in positions
            ]
            mixed.append([one / sum(row) for one in row])
        size = range(len(positions))
        flow = [[sum(mixed[i][k] * flow[k][j] for k in size) for j in size] for i in size]
    rows = flow if query is None else [flow[query]]
    return [sum(row[j] for row in rows) / len(rows) for j in range(len(positions))]


def attention(weights: Array, positions: list[int], heads: str, query: int | None) -> list[float]:
    chosen = positions if query is None else [positions[query]]
    of = {"max": max, "mean": lambda found: sum(found) / HEADS}[heads]
    return [sum(of([weights[head, i, j] for head in range(HEADS)]) for i in chosen) / len(chosen) for j in positions]


QUERIES = {"mean": None, "cls": 0, "last": -1}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("queries", QUERIES)
class TestFormulas:
    @pytest.mark.parametrize("residual", [0.0, 0.5, 0.9])
    def test_rollout(self, causal: bool, left: bool, queries: Any, residual: float) -> None:
        wrapped, weights = hooked(causal=causal, left=left)
        found = Rollout(wrapped, residual=residual, queries=queries, layer=None).explain(0)
        for layer in range(LAYERS):
            for example, length in enumerate(LENGTHS):
                rows = found.select(example=example, depth=layer + 1)
                places = rows["position"].tolist()
                assert len(places) == length
                right = rollout(weights[: layer + 1, example], places, residual, QUERIES[queries])
                np.testing.assert_allclose(rows["score"], right, atol=1e-6)
                assert rows["score"].sum() == pytest.approx(1, abs=1e-5)
        padding = found.select(valid=False)
        assert len(padding)
        assert not padding["score"].any()

    @pytest.mark.parametrize("heads", ["max", "mean"])
    def test_attention(self, causal: bool, left: bool, queries: Any, heads: Any) -> None:
        wrapped, weights = hooked(causal=causal, left=left)
        found = Attention(wrapped, heads=heads, queries=queries).explain(0)
        for layer in range(LAYERS):
            for example in range(len(LENGTHS)):
                rows = found.select(example=example, depth=layer)
                right = attention(weights[layer, example], rows["position"].tolist(), heads, QUERIES[queries])
                np.testing.assert_allclose(rows["score"], right, atol=1e-6)
        assert not found.select(valid=False)["score"].any()


def test_a_residual_of_one_is_the_query_itself() -> None:
    wrapped, _ = hooked(causal=False, left=False)
    rows = Rollout(wrapped, residual=1.0, queries="last").explain(0).select()
    for example, length in enumerate(LENGTHS):
        assert rows.select(example=example)["score"].tolist() == [0.0] * (length - 1) + [1.0]


def test_the_scores_of_rollout_have_the_site_of_the_input_and_the_depth_of_the_output() -> None:
    wrapped, _ = hooked(causal=False, left=False)
    found = Rollout(wrapped).explain(0)
    assert found.sites == ("0:input",)
    assert set(found["depth"]) == {LAYERS}
