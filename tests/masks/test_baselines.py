"""Baselines: what they start from and gather, and that they follow their site's dtype."""

from __future__ import annotations

import pytest
import torch

from maskhooks.errors import SettingError
from maskhooks.masks.baselines import Baseline, Learned, Mean, Token, Zero
from maskhooks.masks.mix import mix


def fitted(baseline: Baseline, *batches: torch.Tensor) -> torch.Tensor:
    baseline.start(tuple(batches[0].shape[1:]))
    for values in batches:
        baseline.fit(values)
    return baseline().detach()


BATCHES = [torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(count)) * 3 + 5 for count in (1, 7, 30)]


def test_zero() -> None:
    assert fitted(Zero(), *BATCHES).eq(0).all()


@pytest.mark.parametrize("baseline", [Mean, Learned])
def test_mean_and_deviation_over_all_batches(baseline: type[Mean] | type[Learned]) -> None:
    made = baseline()
    vector = fitted(made, *BATCHES)
    everything = torch.cat(BATCHES).double()
    torch.testing.assert_close(vector.double(), everything.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.deviation.double(), everything.std(0, unbiased=False), rtol=1e-5, atol=1e-5)


def test_a_batch_without_positions_changes_nothing() -> None:
    baseline = Mean()
    vector = fitted(baseline, BATCHES[1]).clone()
    baseline.fit(torch.zeros(0, 2, 3))
    assert torch.equal(baseline(), vector)
    assert vector.isfinite().all()


def test_statistics_are_float32_whatever_the_values() -> None:
    vector = fitted(Mean(), *(values.bfloat16() for values in BATCHES))
    assert vector.dtype == torch.float32


def test_learned_is_a_parameter_and_may_start_elsewhere() -> None:
    baseline = Learned(init=torch.ones(2, 3))
    assert fitted(baseline, *BATCHES).eq(1).all()
    assert [name for name, _ in baseline.named_parameters()] == ["offset"]
    assert baseline().requires_grad


def test_token() -> None:
    embedding = torch.nn.Embedding(5, 3)
    baseline = Token(embedding.weight[2])
    assert torch.equal(fitted(baseline, torch.randn(4, 3)), embedding.weight[2].detach())
    assert not list(baseline.parameters())


def test_token_without_a_value() -> None:
    with pytest.raises(SettingError, match=r"Token\(embedding.weight\[mask_id\]\)"):
        Token().start((3,))


@pytest.mark.parametrize("baseline", [Learned(init=torch.ones(4)), Token(torch.ones(4))])
def test_another_shape(baseline: Baseline) -> None:
    with pytest.raises(SettingError, match=r"has shape \[4\], but the site's features have shape \[3\]"):
        baseline.start((3,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_baseline_does_not_promote_its_site(dtype: torch.dtype) -> None:
    baseline = Learned()
    baseline.start((3,))
    value = torch.randn(2, 3, dtype=dtype)
    mixed = mix(value, torch.zeros(2, 1), baseline())
    assert mixed.dtype == dtype
    mixed.sum().backward()
    assert baseline.offset.grad is not None
    assert baseline.offset.grad.dtype == torch.float32


def test_state_is_saved() -> None:
    baseline = Mean()
    fitted(baseline, *BATCHES)
    twin = Mean()
    twin.start((2, 3))
    twin.load_state_dict(baseline.state_dict())
    assert torch.equal(twin(), baseline())
    twin.fit(BATCHES[0])
    baseline.fit(BATCHES[0])
    assert torch.equal(twin(), baseline())
