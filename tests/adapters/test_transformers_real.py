"""A trained model from disk: sites, names, labels and replay on real sentences."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import maskhooks
from maskhooks.hooks.replay import Replay
from tests.conftest import same_bits

DATA = Path(os.environ.get("MASKHOOKS_DATA", Path(__file__).parents[3] / "shared"))
FOLDER = DATA / "models" / "minilm-sst5"
SENTENCES = ["A gorgeous , witty , seductive movie .", "It is a bad film ."]


@pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason=f"no model in {FOLDER} (MASKHOOKS_DATA)")
def test_a_trained_classifier() -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([4, 0])
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32).train()
    hooked = maskhooks.wrap(model, example=batch)
    assert len(hooked.sites.tagged("hidden")) == 8
    assert len(hooked.sites.tagged("head")) == len(hooked.sites.tagged("mlp")) == 6
    names = hooked.task.names(hooked.sites[0], batch)
    assert names is not None
    assert names[1] == ["[CLS]", "it", "is", "a", "bad", "film", ".", "[SEP]"] + ["[PAD]"] * (len(names[0]) - 8)
    assert hooked.task.targets(batch) == ["very positive", "very negative"]

    with torch.no_grad(), hooked.tap(read="hidden") as tap:
        clean = hooked(batch).logits
        result = hooked.distribution(tap.outputs, batch)
    words = hooked.task.predictions(result)
    assert words is not None
    assert words[0] in ("positive", "very positive")
    assert words[1] in ("negative", "very negative")
    assert len(tap.values) == 8

    replay = Replay(model)
    replay.trace(lambda: hooked(batch))
    site = hooked.sites[4]
    with torch.no_grad(), hooked.tap(read=[site]), replay.record([site]) as recording:
        hooked(batch)
    with torch.no_grad(), hooked.tap(read=[site]), recording.play(site):
        assert same_bits(hooked(batch).logits, clean)
    assert model.training
