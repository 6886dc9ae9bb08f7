"""What gates do at a site, and that a short training run comes to the same numbers with a partner as without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from maskhooks import DiffMask, Recipe
from maskhooks.masks.mix import mix
from maskhooks.model.hooked import Hooked
from tests.conftest import same_bits

PATTERN = "batch token hidden -> batch token"
QUICK = dataclasses.replace(Recipe(), steps=6, baseline_steps=2, warmup_steps=2, validations=2)


def last_token(outputs: Any) -> Categorical:
    """What is predicted after the last token, from logits or an output that holds them."""
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return Categorical(logits=logits[:, -1])


def act(hooked: Hooked, batch: Any, other: Any, address: str, logits: Callable[[Any], Tensor]) -> None:
    """Open gates change no bit; closed ones let nothing through, forward and back; gates between learn."""
    with torch.no_grad():
        usual, different = logits(hooked(batch)), logits(hooked(other))
    assert not same_bits(usual, different)
    for z in (0.0, 0.5, 1.0):
        leaves: list[Tensor] = []
        samples: list[Tensor] = []

        def gate(value: Tensor, z: float = z, leaves: Any = leaves, samples: Any = samples) -> Tensor:
            leaves.append(value.detach().clone().requires_grad_())
            samples.append(torch.full(value.shape[:-1], z, requires_grad=True))
            return mix(leaves[-1], samples[-1].unsqueeze(-1), torch.linspace(-1, 1, value.shape[-1]))

        with hooked.tap(replace={address: gate}):
            first, second = logits(hooked(batch)), logits(hooked(other))
            assert same_bits(first, usual) == (z == 1.0)
            assert same_bits(first, second) == (z == 0.0)
            first.square().sum().backward()
        assert bool(leaves[0].grad.any()) == (z != 0.0)
        assert samples[0].grad.any()


def trained(hooked: Hooked, sites: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """What a short run learns."""
    made = DiffMask(hooked, sites, margin=0.5, recipe=QUICK)
    made.fit(batches, batches[:1], accelerator="cpu", progress=False)
    parts = [part for masking in made.maskings for part in (masking.baseline, *(vote.probe for vote in masking.votes))]
    return {f"{i} {name}": tensor for i, part in enumerate(parts) for name, tensor in part.state_dict().items()}
