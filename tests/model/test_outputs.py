"""Outputs as distributions: divergences against sums in float64, agreement, and what is no distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, Normal, VonMises

from maskhooks.errors import UnknownDistributionError
from maskhooks.model.outputs import Positions, agreement, check, count, flip_loss, kl, prediction_loss, predictions


def categorical(logits: Tensor) -> Categorical:
    return Categorical(logits=logits)


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of softmax(p) from softmax(q) in nats, in float64."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


P, Q = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.randn(4, 3)


def test_categorical() -> None:
    divergence = kl(categorical(P), categorical(Q))
    torch.testing.assert_close(divergence.double(), categorical_kl(P, Q), rtol=1e-5, atol=1e-6)
    assert kl(categorical(P), categorical(P)).eq(0).all()


def test_a_sure_wrong_categorical_is_far_away_and_not_infinitely() -> None:
    p, q = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), torch.tensor([[0.0, -200.0], [0.0, -torch.inf]])
    logits = q.requires_grad_()
    divergence = kl(categorical(p), categorical(logits))
    torch.testing.assert_close(divergence.detach(), torch.tensor([100.0 - math.log(2), 0.0]))
    divergence.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5], [0.0, 0.0]]))


def test_several_axes_add_up() -> None:
    p, q = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    expected = categorical_kl(p, q).sum(1)
    torch.testing.assert_close(kl(categorical(p), categorical(q)).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_sure_wrong_bernoulli_is_far_away_and_not_infinitely() -> None:
    p, q = torch.tensor([20.0, -20.0, 30.0]), torch.tensor([-20.0, 20.0, 30.0])
    logits = q.requires_grad_()
    divergence = kl(Bernoulli(logits=p), Bernoulli(logits=logits))
    torch.testing.assert_close(divergence.detach(), torch.tensor([20.0, 20.0, 0.0]))
    divergence.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-1.0, 1.0, 0.0]))


def test_bernoulli_labels_add_up() -> None:
    p, q = torch.rand(4, 5), torch.rand(4, 5)
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    torch.testing.assert_close(kl(Bernoulli(probs=p), Bernoulli(probs=q)), expected, rtol=1e-4, atol=1e-5)


def test_normal() -> None:
    one, other = Normal(torch.tensor([0.0, 1.0]), 1.0), Normal(torch.tensor([2.0, 1.0]), 1.0)
    torch.testing.assert_close(kl(one, other), torch.tensor([2.0, 0.0]))


def test_heads_add_up() -> None:
    one = {"start": categorical(P), "end": categorical(Q)}
    other = {"end": categorical(P), "start": categorical(Q)}
    expected = categorical_kl(P, Q) + categorical_kl(Q, P)
    torch.testing.assert_close(kl(one, other).double(), expected, rtol=1e-5, atol=1e-6)


def test_positions_are_averaged_over_the_chosen_ones() -> None:
    p, q = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    chosen = torch.tensor([[True, False, True], [False, False, True]])
    q[~chosen] = float("inf")  # a position that is not chosen has no say, not even with NaN
    one = Positions(Categorical(logits=p, validate_args=False), chosen)
    other = Positions(Categorical(logits=q, validate_args=False), chosen)
    each = categorical_kl(p, q)
    expected = torch.stack([(each[0, 0] + each[0, 2]) / 2, each[1, 2]])
    torch.testing.assert_close(kl(one, other).double(), expected, rtol=1e-5, atol=1e-6)


def test_an_example_without_a_chosen_position() -> None:
    with pytest.raises(UnknownDistributionError, match=r"no position whose prediction counts.*wrap\(model, output"):
        Positions(categorical(torch.zeros(2, 3, 4)), torch.tensor([[True] * 3, [False] * 3]))


def test_agreement() -> None:
    p = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert agreement(categorical(p), categorical(p.flip(-1))).tolist() == [0, 0]
    assert agreement(categorical(p), categorical(p * 5)).tolist() == [1, 1]
    both = {"a": categorical(p), "b": categorical(p)}
    assert agreement(both, {"a": categorical(p), "b": categorical(p.flip(-1))}).tolist() == [0, 0]
    labels = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    other = torch.tensor([[0.8, 0.2], [0.8, 0.7]])
    assert agreement(Bernoulli(labels), Bernoulli(other)).tolist() == [1, 0]
    near, far = Normal(torch.zeros(2), 1.0), Normal(torch.tensor([0.5, 2.0]), 1.0)
    assert agreement(near, far).tolist() == [1, 0]
    wide = Independent(Normal(torch.zeros(2, 3), 1.0), 1)
    assert agreement(wide, Independent(Normal(torch.tensor([[0.0] * 3, [0, 0, 3.0]]), 1.0), 1)).tolist() == [
        1,
        0,
    ]
    chosen = torch.ones(1, 2, dtype=torch.bool)
    pair = (
        Positions(categorical(p[None]), chosen),
        Positions(categorical(torch.tensor([[[2.0, 1], [1, 0]]])), chosen),
    )
    assert agreement(*pair).tolist() == [0.5]


def test_predictions() -> None:
    p = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert predictions(categorical(p)) == ["0", "1"]
    assert predictions({"start": categorical(p), "end": categorical(p)}) == [
        "start: 0, end: 0",
        "start: 1, end: 1",
    ]
    assert predictions(Normal(torch.zeros(2), 1.0)) is None


@pytest.mark.parametrize("outputs", [torch.zeros(2, 3), {}, None, {"logits": torch.zeros(2)}])
def test_what_is_no_distribution(outputs: Any) -> None:
    with pytest.raises(UnknownDistributionError, match=r"Categorical\(logits=outputs\)") as raised:
        check(outputs)
    assert type(outputs).__name__ in str(raised.value)


def test_distributions_without_a_divergence() -> None:
    one = VonMises(torch.zeros(2), torch.ones(2))
    with pytest.raises(UnknownDistributionError, match=r"no KL divergence from VonMises.*register_kl"):
        kl(one, one)


class TestOvertaken:
    def test_counts_from_where_the_lead_shrinks(self):
        original = Categorical(logits=torch.tensor([[2.0, 0.0, -1.0]]).expand(4, 3))
        masked = Categorical(
            logits=torch.tensor([[2.0, 0.0, -1.0], [0.4, 0.0, 0.0], [0.1, 0.0, -5.0], [0.0, 1.0, 5.0]])
        )
        torch.testing.assert_close(flip_loss(original, masked), torch.tensor([0.0, 0.0, 0.2, 5.3]))

    def test_a_lead_that_was_small_need_not_grow(self):
        close = Categorical(logits=torch.tensor([[0.1, 0.0]]))
        torch.testing.assert_close(flip_loss(close, close), torch.tensor([0.0]))

    def test_binary_heads_and_positions(self):
        original = Bernoulli(logits=torch.tensor([[3.0, -3.0]]))
        masked = Bernoulli(logits=torch.tensor([[-1.0, -2.0]]))
        torch.testing.assert_close(flip_loss(original, masked), torch.tensor([1.3]))
        both = flip_loss({"a": original, "b": original}, {"a": masked, "b": original})
        torch.testing.assert_close(both, torch.tensor([1.3]))
        tokens = Categorical(logits=torch.tensor([[[2.0, 0.0], [2.0, 0.0]]]))
        moved = Categorical(logits=torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]))
        chosen = torch.tensor([[True, True]])
        torch.testing.assert_close(flip_loss(Positions(tokens, chosen), Positions(moved, chosen)), torch.tensor([0.65]))

    def test_numbers_are_not_overtaken(self):
        one, other = Normal(torch.zeros(2), torch.ones(2)), Normal(torch.ones(2), torch.ones(2))
        assert flip_loss(one, other).tolist() == [0.0, 0.0]


def test_prediction_loss_is_that_of_the_original_prediction() -> None:
    first = Categorical(logits=torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    other = Categorical(probs=torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]))
    assert torch.allclose(prediction_loss(first, other), -torch.tensor([0.5, 0.1]).log())
    yes = Bernoulli(logits=torch.tensor([3.0, -1.0]))
    no = Bernoulli(probs=torch.tensor([0.25, 0.25]))
    assert torch.allclose(prediction_loss(yes, no), -torch.tensor([0.25, 0.75]).log())
    both = {"a": first, "b": first}
    assert torch.allclose(prediction_loss(both, {"a": other, "b": other}), 2 * prediction_loss(first, other))
    several = Positions(Categorical(logits=torch.zeros(1, 2, 4)), torch.tensor([[True, False]]))
    assert torch.allclose(prediction_loss(several, several), torch.tensor([4.0]).log())
    normal = Normal(torch.zeros(2), torch.ones(2))
    with pytest.raises(UnknownDistributionError, match="needs classes"):
        prediction_loss(normal, normal)


def test_counting_examples() -> None:
    one = Categorical(logits=torch.zeros(3, 2))
    assert (
        count(one),
        count({"a": one}),
        count(Positions(Categorical(logits=torch.zeros(2, 5, 4)), torch.ones(2, 5) > 0)),
    ) == (3, 3, 2)
