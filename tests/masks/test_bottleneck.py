"""Information bottlenecks: noise with a site's statistics, and the capacity of the mixture."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from maskhooks.errors import PatternError
from maskhooks.hooks.tap import Values
from maskhooks.masks.baselines import Noise
from maskhooks.masks.bottleneck import Bottleneck, gaussian_kl
from maskhooks.masks.probes import PerExampleLogits
from maskhooks.masks.samples import Masked
from maskhooks.masks.votes import Vote
from maskhooks.seeds import generator
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site

TOKENS, HEADS = "batch token hidden -> batch token", "batch token (head dim) -> batch token head, head=2"
PIXELS = "batch channel row column -> batch row column"


def made(pattern: str = TOKENS, logit: float = 1.0, site: str = "layer:output", **settings) -> Bottleneck:
    probe = PerExampleLogits(init_logit=logit, init_std=1.0, min_logit=-20.0, max_logit=20.0)
    return Bottleneck(Site.parse(site, pattern=pattern), 0, [Vote((), probe)], Noise(), **settings)


def value(*shape: int) -> torch.Tensor:
    scale = torch.linspace(0.5, 2, shape[1] if len(shape) == 4 else shape[-1])
    drawn = torch.randn(shape, generator=generator(3))
    return drawn * (scale[:, None, None] if len(shape) == 4 else scale) + 1


def begun(masking: Bottleneck, held: torch.Tensor, previous: torch.Tensor | None = None) -> Values:
    """Start and fit a bottleneck on a value, and draw logits for it."""
    values = Values({str(masking.site): held, **({} if previous is None else {str(masking.previous): previous})})
    masking.start(masking.sizes_for(values), held.device)
    known = masking.pattern.shape(held)
    rows = masking.site.gating().rows(held)
    masking.baseline.fit(rows.flatten(0, -2).reshape(-1, *masking.sizes["baseline"]))
    probe = masking.votes[0].probe
    assert isinstance(probe, PerExampleLogits)
    probe.begin([known[axis] for axis in masking.pattern.positions], held.device, generator(4))
    return values


def sampled(masking: Bottleneck, values: Values, seed: int = 1, **settings) -> Masked:
    held = values[masking.site]
    positions = [masking.pattern.shape(held)[axis] for axis in masking.pattern.positions]
    return masking.sample(values, Places(torch.ones(positions, dtype=torch.bool)), generator(seed), **settings)


def test_the_kl_is_that_of_two_normals() -> None:
    mean, log_variance = torch.linspace(-3, 3, 25, dtype=torch.float64), torch.linspace(-9, 1, 25, dtype=torch.float64)
    one = Normal(mean, (log_variance / 2).exp())
    torch.testing.assert_close(gaussian_kl(mean, log_variance), kl_divergence(one, Normal(0 * mean, 1 + 0 * mean)))


@pytest.mark.parametrize("per_feature", [True, False])
@pytest.mark.parametrize(("pattern", "shape"), [(TOKENS, (3, 5, 4)), (HEADS, (3, 5, 4)), (PIXELS, (2, 3, 6, 5))])
def test_capacity_is_the_mean_kl_of_each_gate(pattern: str, shape: tuple[int, ...], per_feature: bool) -> None:
    """Element by element, against torch's KL between the mixture and the noise."""
    held = value(*shape)
    masking = made(pattern, per_feature=per_feature)
    masked = sampled(masking, begun(masking, held))
    z = masking.pattern.spread(masked.sample, held).expand_as(held)
    axes = (0, 2, 3) if len(shape) == 4 else (0, 1)
    mean, deviation = held.mean(axes, keepdim=True), held.std(axes, unbiased=False, keepdim=True)
    noise = Normal(mean.expand_as(held), deviation.expand_as(held))
    found = kl_divergence(Normal(z * held + (1 - z) * mean, (1 - z) * deviation), noise)
    if per_feature:
        wanted = masked.nats if len(shape) == 3 else masked.nats.permute(0, 3, 1, 2)
        torch.testing.assert_close(wanted.reshape(shape), found, rtol=1e-4, atol=1e-5)
    elif pattern == HEADS:
        torch.testing.assert_close(masked.nats, found.view(3, 5, 2, 2).mean(-1), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(masked.nats, found.mean(1 if len(shape) == 4 else 2), rtol=1e-4, atol=1e-5)


def test_the_mixture_has_the_statistics_of_the_data() -> None:
    held = value(400, 5, 4)
    masking = made(logit=-15.0)
    values = begun(masking, held)
    masked = sampled(masking, values)
    torch.testing.assert_close(masked.replaced.mean((0, 1)), held.mean((0, 1)), rtol=0.1, atol=0.1)
    torch.testing.assert_close(masked.replaced.std((0, 1)), held.std((0, 1)), rtol=0.1, atol=0.1)
    assert masked.nats.max() < 1e-3
    assert not torch.equal(masked.baseline, sampled(masking, values, seed=2).baseline)
    assert torch.equal(masked.baseline, sampled(masking, values).baseline)


@pytest.mark.parametrize("rounded", [0.5, 1.0])
def test_rounded_gates_let_all_through_or_nothing(rounded: float) -> None:
    held = value(3, 5, 4)
    masking = made()
    values = begun(masking, held)
    masked = sampled(masking, values, rounded=rounded)
    kept = masking.probability(values, Places(torch.ones(3, 5, dtype=torch.bool))) > rounded
    assert torch.equal(masked.replaced, torch.where(kept, held, masked.baseline))
    assert bool(kept.any()) is (rounded < 1)


def test_gradients_are_finite_where_gates_are_at_an_end() -> None:
    held = value(3, 5, 4)
    masking = made(logit=0.0)
    values = begun(masking, held)
    probe = masking.votes[0].probe
    assert isinstance(probe, PerExampleLogits)
    with torch.no_grad():
        probe.logits.copy_(torch.tensor([-20.0, -3.0, 3.0, 20.0]).expand_as(probe.logits))
    masked = sampled(masking, values)
    masked.nats.sum().backward()
    assert probe.logits.grad is not None
    assert probe.logits.grad.isfinite().all()
    assert masked.nats.isfinite().all()


@torch.no_grad()
def test_smoothing_blurs_rows_and_columns_of_each_channel() -> None:
    held = value(2, 3, 7, 6)
    masking = made(PIXELS, smoothing=1.0)
    values = begun(masking, held)
    plain = made(PIXELS)
    plain.votes = masking.votes
    plain.baseline, plain.pattern = masking.baseline, masking.pattern
    z, blurred = (sampled(one, values).sample for one in (plain, masking))
    weights = [math.exp(-0.5 * k**2) for k in range(-2, 3)]
    total = sum(weights)

    def mirrored(index: int, size: int) -> int:
        return -index if index < 0 else 2 * (size - 1) - index if index >= size else index

    for example, row, column, channel in [(0, 3, 3, 1), (1, 0, 5, 2), (1, 6, 0, 0)]:
        wanted = sum(
            weights[a + 2] * weights[b + 2] * z[example, mirrored(row + a, 7), mirrored(column + b, 6), channel]
            for a in range(-2, 3)
            for b in range(-2, 3)
        )
        assert blurred[example, row, column, channel].item() == pytest.approx(float(wanted) / total**2, abs=1e-5)


def test_smoothing_needs_rows_and_columns() -> None:
    with pytest.raises(PatternError, match="two position axes beside the batch"):
        made(TOKENS, smoothing=1.0)


def test_noise_around_the_layer_below() -> None:
    held, below = value(3, 5, 4), value(3, 5, 4) - 7
    masking = made(logit=-15.0, previous=Site.parse("below:output", pattern=TOKENS))
    assert [str(site) for site in masking.reads] == ["layer:output", "below:output"]
    masked = sampled(masking, begun(masking, held, below))
    far = masked.replaced - below
    assert 0 < far.abs().max() < 0.02
    assert far.std().item() == pytest.approx(math.sqrt(1e-5), rel=0.3)
