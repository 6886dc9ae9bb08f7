"""Coloured stars: the data are what the task says, the true edges are known, and GraphMask finds them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from maskhooks import GraphMask, Recipe
from maskhooks.explainers.random import Random
from maskhooks.toy_tasks import stars

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def data() -> tuple[stars.Stars, stars.Stars, stars.Stars]:
    return stars.generate(4400)


@pytest.fixture(scope="module")
def model(data: tuple[stars.Stars, ...]) -> stars.StarsModel:
    *_, (_, trained) = stars.train_model(data[0], epochs=8, learning_rate=5e-3, size=40)
    return trained


def test_sizes_and_rates(data: tuple[stars.Stars, ...]) -> None:
    train, validation, test = data
    assert [len(part) for part in data] == [3600, 400, 400]
    leaves = train.valid.sum(1)
    assert set(leaves.tolist()) == set(range(6, 13))
    assert bool((train.query[:, 0] != train.query[:, 1]).all())
    assert train.truth().float().mean() == pytest.approx(1 / 3, abs=0.02)
    assert train.label.mean() == pytest.approx(0.384, abs=0.03)
    assert not torch.equal(validation.query, test.query)


def test_graphs_hold_each_star_with_its_centre_last(data: tuple[stars.Stars, ...]) -> None:
    part = data[2][:3]
    batch = part.graphs()
    leaves = part.valid.sum(1).tolist()
    assert batch.centre.tolist() == [leaves[0], leaves[0] + leaves[1] + 1, sum(leaves) + 2]
    assert batch.star.tolist() == [0] * leaves[0] + [1] * leaves[1] + [2] * leaves[2]
    assert bool((batch.edges[1] == batch.centre[batch.star]).all())
    assert sorted(batch.edges[0].tolist() + batch.centre.tolist()) == list(range(len(batch.features)))
    assert bool((batch.features[batch.centre] == -1).all())
    first = batch.features[batch.edges[0, 0]]
    assert first.nonzero()[:, 0].tolist() == [int(part.query[0, 0]), 6 + int(part.query[0, 1])]


def test_the_model_learns(data: tuple[stars.Stars, ...], model: stars.StarsModel) -> None:
    assert stars.accuracy(model, data[2]) > 0.97


def test_graphmask_finds_the_true_edges(data: tuple[stars.Stars, ...], model: stars.StarsModel) -> None:
    """And nothing goes around the messages: that would be a warning, which is an error here."""
    train, validation, test = data
    hooked = stars.hook(model)
    quick = dataclasses.replace(Recipe.named("graph"), learning_rate=1e-2, steps=240)
    explainer = GraphMask(hooked, margin=0.1, recipe=quick)
    explainer.fit(train.batches(), validation.batches(500), progress=False)
    explanation = explainer.explain(test.graphs())
    found = stars.quality(stars.kept(explanation), test)
    assert min(found) > 0.95
    assert explanation["relation"].tolist() == test.colour[test.valid].tolist()
    assert explanation["label"][0] == f"colour {explanation['relation'][0]}"
    assert explanation["source"].tolist() == explanation["position"].tolist()
    assert int(explanation["example"].max()) == 399
    chance = stars.quality(stars.kept(Random(hooked, stars.MESSAGE).explain(test.graphs())), test)
    assert chance.f1 < 0.5


def test_quality_counts_edges() -> None:
    data = stars.Stars(torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4, dtype=torch.bool))
    assert stars.quality(torch.tensor([True, False, True, True]), data) == (1 / 3, 1 / 2, 2 / 5)
    assert stars.quality(torch.zeros(4, dtype=torch.bool), data) == (0, 0, 0)
