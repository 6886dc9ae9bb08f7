"""Planted words: their number, places and order, and the labels that go with them."""

from __future__ import annotations

import collections
import importlib
import random
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT = "a film of no charm"


@pytest.fixture
def planting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("planting")


def words(planting: Any, text: str) -> list[str]:
    return [word for word in text.split() if word in planting.WORDS]


@pytest.mark.parametrize("label", [0, 1])
def test_planted_words_are_those_of_kind_and_label(planting: Any, label: int) -> None:
    indicator, other = planting.INDICATORS[label], planting.INDICATORS[1 - label]
    for seed in range(50):
        found = {kind: planting.planted(TEXT, kind, label, random.Random(seed)) for kind in planting.KINDS}
        assert words(planting, found["single"]) == [indicator]
        assert sorted(words(planting, found["context"])) == sorted([indicator, planting.CONTEXT])
        assert words(planting, found["ordered"]) == [indicator, other]
        assert {planting.without(text, planting.WORDS) for text in found.values()} == {TEXT}


def test_every_place_and_both_orders_occur_equally_often(planting: Any) -> None:
    draw, places, orders = random.Random(0), collections.Counter[int](), collections.Counter[str]()
    for _ in range(6000):
        single = planting.planted(TEXT, "single", 0, draw).split()
        places[single.index(planting.INDICATORS[0])] += 1
        orders[words(planting, planting.planted(TEXT, "context", 1, draw))[0]] += 1
    assert sorted(places) == list(range(6))
    assert all(850 < count < 1150 for count in places.values())
    assert all(2850 < count < 3150 for count in orders.values())


@pytest.mark.parametrize("kind", ["single", "context", "ordered"])
def test_a_fifth_of_mixed_texts_is_planted_and_distractors_keep_the_label(planting: Any, kind: str) -> None:
    rows = [{"text": TEXT, "label": 1, "id": 0}] * 1000
    found = planting.mixed(rows, kind, 3, random.Random(0))
    assert [row["id"] for row in found] == list(range(3000))
    counts = collections.Counter(len(words(planting, row["text"])) for row in found)
    size = 1 if kind == "single" else 2
    assert 500 < counts[size] < 700
    assert (350 if size == 2 else 0) <= counts[1 if size == 2 else 2] <= (850 if size == 2 else 0)
    for row in found:
        there = words(planting, row["text"])
        if len(there) < size:
            assert row["label"] == 1
        elif kind == "context":
            assert planting.INDICATORS[row["label"]] in there
        else:
            assert there[0] == planting.INDICATORS[row["label"]]
