"""IBA with smoothing on a CNN of handwritten digits, against a plain loop with a blur written out place by place."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

import maskhooks
from maskhooks import IBA, Recipe
from maskhooks.seeds import generator
from maskhooks.training.per_example import _EXPLAIN

pytest.importorskip("sklearn")

from tests.digits import TRAINED, cnn, digits, held_out  # after the check for what it needs

STEPS, COPIES, BETA, PATTERN = 6, 3, 0.5, "batch channel row column -> batch row column"


def mirrored(index: int, size: int) -> int:
    """The place that a mirror behind each end shows, the end itself only once."""
    while not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index if size > 1 else 0


def blurred(z: Tensor, sigma: float) -> Tensor:
    """A kernel of 2 round(2 sigma) + 1 places a side, `[batch, channel, row, column]`, each channel by itself."""
    reach, (rows, columns) = round(2 * sigma), z.shape[-2:]
    reached = range(-reach, reach + 1)
    weights = torch.tensor([[math.exp(-(a * a + b * b) / (2 * sigma**2)) for b in reached] for a in reached])
    weights = weights / weights.sum()
    places = []
    for row in range(rows):
        for column in range(columns):
            terms = [
                weights[a + reach, b + reach] * z[..., mirrored(row + a, rows), mirrored(column + b, columns)]
                for a in reached
                for b in reached
            ]
            places.append(torch.stack(terms).sum(0))
    return torch.stack(places, -1).view_as(z)


def plainly(layers: int, images: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Gates of each unit and bits of each place, after a loop of passes from the map that `layers` modules make."""
    model = cnn()
    below, above = model[:layers], model[layers:]
    with torch.no_grad():
        seen = below(digits()[0][:TRAINED])
        mean = seen.mean((0, 2, 3), keepdim=True)
        deviation = seen.std((0, 2, 3), unbiased=False, keepdim=True).clamp(min=0.01)
        held = below(images)
        target = above(held).argmax(-1)
    alpha = torch.full_like(held, 5.0).requires_grad_()
    optimizer = torch.optim.Adam([alpha], 1.0)

    def gates() -> Tensor:
        z = torch.sigmoid(alpha)
        return blurred(z, sigma) if sigma else z

    def capacity(z: Tensor) -> Tensor:
        log_variance = (2 * (1 - z).log()).clamp(min=-10)
        return 0.5 * (log_variance.exp() + (z * (held - mean) / deviation) ** 2 - 1 - log_variance)

    for step in range(STEPS):
        noise = torch.randn(COPIES * len(held), *held.shape[1:], generator=generator(0, _EXPLAIN, 0, 0, step))
        z = gates()
        mixed = z.repeat(COPIES, 1, 1, 1) * held.repeat(COPIES, 1, 1, 1)
        mixed = mixed + (1 - z.repeat(COPIES, 1, 1, 1)) * (mean + deviation * noise)
        loss = F.cross_entropy(above(mixed), target.repeat(COPIES), reduction="none").view(COPIES, -1).mean(0)
        optimizer.zero_grad()
        (loss + BETA * capacity(z).mean((1, 2, 3))).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return gates(), capacity(gates()).sum(1) / math.log(2)


def alike(found: Tensor, wanted: Tensor) -> bool:
    """But for one in twenty: Adam's first steps take the sign of a gradient, also of one that is nearly 0."""
    return bool(((found - wanted).abs() <= 2e-3 * (1 + wanted.abs())).float().mean() > 0.95)


@pytest.mark.parametrize(("site", "layers", "size"), [("0:output", 1, 8), ("2:output", 3, 4), ("4:output", 5, 2)])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_bits_of_each_place(site: str, layers: int, size: int, sigma: float) -> None:
    """Also on a map of 2 by 2, which is smaller than the kernel."""
    hooked = maskhooks.wrap(cnn(), sites={site: PATTERN}, output=lambda logits: Categorical(logits=logits))
    recipe = dataclasses.replace(Recipe.named("iba"), steps=STEPS, samples=COPIES)
    explainer = IBA(hooked, site, beta=BETA, smoothing=sigma, recipe=recipe)
    explainer.fit([digits()[0][:TRAINED]], progress=False)
    images, classes = (part[:12] for part in held_out())
    found = torch.from_numpy(explainer.explain(images)["score"]).view(12, size, size)
    gates, bits = plainly(layers, images, sigma)
    assert alike(found, bits)
    assert found.std() > 0.1
    (masking,) = explainer.maskings
    (probe,) = [vote.probe for vote in masking.votes]
    own = masking._smoothed(torch.sigmoid(probe.logits)).permute(0, 3, 1, 2)
    assert alike(own, gates)
    assert (cnn()(images).argmax(-1) == classes).float().mean() > 0.8


def test_smoothing_makes_neighbours_alike() -> None:
    """The blur of a share that is drawn at random has less contrast, and the same mean inside."""
    z = torch.rand(1, 1, 9, 9)
    soft = blurred(z, 1.0)
    assert soft.std() < 0.4 * z.std()
    torch.testing.assert_close(blurred(torch.full_like(z, 0.3), 1.0), torch.full_like(z, 0.3))
