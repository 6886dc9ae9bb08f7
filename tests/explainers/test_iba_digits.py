"""IBA over the layers of a CNN and of a ViT that read handwritten digits: maps of several sizes, patches, pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import IBA, Explanation, Schulz
from maskhooks.errors import SettingError
from maskhooks.explanations.profile import lost, plot_profile, profile
from maskhooks.model.hooked import Hooked

pytest.importorskip("sklearn")

from tests.digits import cnn, digits, held_out, vit  # after the check for what it needs

MAP, STATE = "batch channel row column -> batch row column", "batch patch hidden -> batch patch"
#: The units of each site of the CNN, by which a price of each bit becomes a price of the mean.
UNITS = {":input": 64, "0:output": 8 * 64, "2:output": 16 * 16, "4:output": 32 * 4}
PRICE = 0.01  # nats of loss per nat


def wrapped(model: nn.Module, sites: Mapping[str, str], **options: Any) -> Hooked:
    return maskhooks.wrap(model, sites=sites, output=lambda logits: Categorical(logits=logits), **options)


def of_the_cnn() -> Explanation:
    hooked, images = wrapped(cnn(), dict.fromkeys(UNITS, MAP)), held_out()[0][:8]
    parts = []
    for site, units in UNITS.items():
        iba = IBA(hooked, site, beta=PRICE * units, smoothing=1.0).fit([digits()[0][:200]], progress=False)
        parts.append(iba.explain(images))
    return Explanation.concat(parts)


def test_maps_of_several_sizes() -> None:
    explanation = of_the_cnn()
    rows = profile(explanation)
    assert [row.positions for row in rows] == [8 * places for places in (64, 64, 16, 4)]
    assert [row.total for row in rows] == pytest.approx(
        [explanation.select(depth=depth)["score"].sum() / 8 for depth in range(4)]
    )
    assert rows[0].lost == pytest.approx(rows[0].total - rows[1].total, rel=1e-5)
    with pytest.raises(SettingError, match="have different positions"):
        lost(explanation)
    assert set(lost(explanation.select(depth=[0, 1]))["depth"].tolist()) == {0}
    axes = explanation.plot(example=1, kind="profile").axes
    assert [one.images[0].get_array().shape for one in axes if one.images] == [(8, 8)] * 4
    assert len(plot_profile(rows).axes) == 2
    page = maskhooks.report(explanation=explanation)
    assert re.findall("<h2>(.*?)</h2>", page)[:2] == ["What this is about", "Information at each depth"]


def test_pixels_that_nothing_depends_on_give_no_bits() -> None:
    """An input bottleneck: the corners of all digits are dark, and the strokes are in the middle."""
    hooked, images = wrapped(cnn(), {":input": MAP}), held_out()[0][:16]
    iba = IBA(hooked, ":input", beta=PRICE * 64).fit([digits()[0][:200]], progress=False)
    bits = torch.from_numpy(iba.explain(images)["score"]).view(16, 8, 8)
    assert bits[:, 1:7, 2:6].mean() > 1.5 * bits[:, :, [0, 7]].mean()
    shares = Schulz(hooked, ":input", beta=PRICE).fit([digits()[0][:200]], progress=False).explain(images)["score"]
    assert 0 <= shares.min() < shares.max() <= 1


def test_patches_of_a_vit() -> None:
    names = [f"({place // 4}, {place % 4})" for place in range(16)]
    sites = ["embed:output", "blocks.0:output", "blocks.1:output"]
    hooked = wrapped(vit(), dict.fromkeys(sites, STATE), names=lambda batch: [names] * len(batch))
    iba = IBA(hooked, sites).fit([digits()[0][:200]], progress=False)
    explanation = iba.explain(held_out()[0][:6])
    rows = profile(explanation)
    assert [(row.positions, row.examples) for row in rows] == [(96, 6)] * 3
    losses = lost(explanation)
    for depth in (0, 1):
        by_patch = explanation.matrix(2)[0]
        np.testing.assert_allclose(losses.matrix(2)[0][depth], by_patch[depth] - by_patch[depth + 1], rtol=1e-4)
        assert losses.select(depth=depth)["score"].sum() / 6 == pytest.approx(rows[depth].lost, rel=1e-4)
    drawn = [one for one in explanation.plot(kind="profile").axes if one.images]
    assert [one.images[0].get_array().shape for one in drawn] == [(4, 4)] * 3
    assert len([one for one in losses.plot().axes if one.images]) == 2


def test_both_models_have_learned_to_read_digits() -> None:
    images, classes = held_out()
    for model in (cnn(), vit()):
        with torch.no_grad():
            assert (model(images).argmax(-1) == classes).float().mean() > 0.85
