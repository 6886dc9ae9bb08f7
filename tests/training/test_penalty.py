"""The penalty: lost predictions are charged for, and each predicted class counts the same."""

import torch
from torch.distributions import Categorical, Normal

from maskhooks.model.outputs import flip_loss, kl
from maskhooks.training.penalty import Penalty


def classes(*labels: int) -> Categorical:
    return Categorical(logits=3 * torch.nn.functional.one_hot(torch.tensor(labels), 3).float())


def test_by_default_it_is_the_divergence():
    original, masked = classes(0, 1), classes(1, 1)
    penalty = Penalty()
    penalty.fit(original)
    assert torch.equal(penalty(original, masked, kl(original, masked)), kl(original, masked))


def test_lost_predictions_are_charged_for():
    original, masked = classes(0, 1), classes(1, 1)
    divergence = kl(original, masked)
    charged = Penalty(2.0)(original, masked, divergence)
    torch.testing.assert_close(charged, divergence + 2 * flip_loss(original, masked))
    assert charged[0] > divergence[0]
    assert charged[1] == divergence[1] == 0


def test_each_predicted_class_counts_the_same():
    outputs = classes(0, 0, 0, 1)
    penalty = Penalty(balance=True)
    penalty.fit(outputs)
    charged = penalty(outputs, outputs, torch.ones(4))
    torch.testing.assert_close(charged, torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0]))
    assert charged.mean() == 1


def test_counts_add_up_over_batches_and_a_class_not_seen_is_not_dear_beyond_bounds():
    penalty = Penalty(balance=True)
    for _ in range(50):
        penalty.fit(classes(0, 1))
    assert penalty.counts is not None
    assert penalty.counts.tolist() == [50, 50, 0]
    assert penalty(classes(2), classes(2), torch.ones(1)).item() == 10.0


def test_what_is_not_one_class_is_not_weighted():
    outputs = Normal(torch.zeros(2), torch.ones(2))
    penalty = Penalty(1.0, balance=True)
    penalty.fit(outputs)
    assert penalty.counts is None
    assert penalty(outputs, outputs, torch.ones(2)).tolist() == [1.0, 1.0]
