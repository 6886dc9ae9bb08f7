"""Short fits of DiffMask on the tagger, with its sites and batches."""

from __future__ import annotations

import dataclasses

import torch

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.seeds import generator
from tests.masks.test_masking import TOKENS, Tagger
from tests.tiny_runs import categorical, padding

QUICK = dataclasses.replace(Recipe(), steps=30, baseline_steps=5, warmup_steps=5, validations=3)
SITES = ["embedding:output", "layers.0:output", "layers.1:output", "layers.2:output"]


def batches(count=3, size=8):
    source = generator(5)
    length = torch.randint(2, 7, (count, size, 1), generator=source)
    return [(torch.randint(0, 11, (size, 6), generator=source), torch.arange(6) < length[i]) for i in range(count)]


def wrapped(model=None, **settings):
    model = Tagger() if model is None else model
    given = {"sites": dict.fromkeys(SITES, TOKENS), "output": categorical, "valid": padding, **settings}
    return maskhooks.wrap(model, **given)


def fitted(hooked, sites="layers.1:output", **settings):
    fit = {key: settings.pop(key) for key in ("steps", "run_dir") if key in settings}
    explainer = DiffMask(hooked, sites, **{"margin": 5.0, "recipe": QUICK, **settings})
    return explainer.fit(batches(), batches(1), progress=False, accelerator="cpu", **fit)
