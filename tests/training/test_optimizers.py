"""Optimizers: the limit on single gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from maskhooks.seeds import generator
from maskhooks.training.optimizers import adam

SPIKE = 500


def path(spike, steps=530, **settings):
    """A weight's values under noise around zero, with one gradient that is a thousand times larger."""
    weight = nn.Parameter(torch.zeros(5))
    optimizer = adam([{"params": [weight], "lr": 0.01}], beta1=0.95, beta2=0.999, **settings)
    source, found = generator(3), []
    for step in range(steps):
        weight.grad = torch.randn(5, generator=source) * (1000.0 if spike and step == SPIKE else 1.0)
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


class TestClip:
    def test_one_gradient_does_not_move_the_weights_far(self):
        free, clipped = ((path(True, clip=clip) - path(False)).abs().amax(0) for clip in (0.0, 2.0))
        assert (clipped < 0.3 * free).all()

    def test_usual_gradients_pass(self):
        assert torch.equal(path(False, clip=10.0), path(False))

    def test_the_norm_is_that_of_the_limit(self):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = adam([{"params": [weight], "lr": 0.1}], beta2=0.5, clip=3.0)
        for gradient in ([3.0, 4.0], [30.0, 40.0]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
        assert weight.grad.tolist() == pytest.approx([9.0, 12.0])

    def test_no_gradient_yet(self):
        weight, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        optimizer = adam([{"params": [weight, unused], "lr": 0.1}], clip=2.0)
        for gradient in (0.0, 1.0, 1.0):
            weight.grad = torch.full((2,), gradient)
            optimizer.step()
        assert (weight < 0).all()
        assert not unused.any()

    def test_a_restored_state_goes_on_alike(self):
        weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        first, second = (adam([{"params": [one], "lr": 0.1}], clip=2.0) for one in weights)
        gradients = torch.randn(6, 3, generator=generator(1)) * torch.tensor([1.0, 1, 1, 50, 1, 1])[:, None]
        for gradient in gradients[:3]:
            weights[0].grad = gradient.clone()
            first.step()
        weights[1].data.copy_(weights[0])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for gradient in gradients[3:]:
            for weight, optimizer in zip(weights, (first, second), strict=True):
                weight.grad = gradient.clone()
                optimizer.step()
        assert torch.equal(*weights)
