"""Free logits: without amortisation, the gates of one batch are optimised directly."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import torch

from maskhooks.errors import MarginWarning
from maskhooks.masking import Masks
from maskhooks.preparation import closed_divergence, sizes, start
from maskhooks.probes import FreeLogits
from maskhooks.problem import Problem
from maskhooks.seeds import generator
from maskhooks.step import Clean, masked_pass

_EXPLAIN = 101


def optimise(problem: Problem, clean: Clean) -> None:
    """Fresh free logits for one batch, and as many steps on them as the recipe has, a multiplier for each example.

    Warns:
        MarginWarning: examples whose masks do not keep within the margin.
    """
    begin(problem.maskings, clean)
    recipe = problem.recipe
    for number, (masking, objective) in enumerate(zip(problem.maskings, problem.objectives, strict=True)):
        probes = {id(vote.probe): vote.probe for part in masking.parts for vote in part.votes}
        logits = [weight for probe in probes.values() for weight in probe.parameters()]
        objective.start(closed_divergence(problem.hooked, clean, masking, problem.divergence))
        optimizer = torch.optim.Adam(logits, lr=recipe.free_rate, betas=(0.9, 0.99))
        for step in range(recipe.steps):
            source = generator(problem.seed, _EXPLAIN, number, step)
            optimizer.zero_grad()
            with torch.enable_grad(), contextlib.ExitStack() as held:
                masked, outputs = masked_pass(problem.hooked, clean, masking, source, held=held)
                divergence = problem.divergence(clean.outputs, outputs)
                loss = objective(masked, divergence, problem.penalty(clean.outputs, outputs, divergence))
                loss.backward()
            optimizer.param_groups[0]["lr"] = recipe.free_rate * recipe.rate(step, recipe.steps)
            optimizer.step()
            objective.ascend(divergence)
        _check_margin(problem, masking, clean)


@torch.no_grad()
def _check_margin(problem: Problem, masking: Masks, clean: Clean) -> None:
    """Warns with MarginWarning of examples whose gates, rounded at one half, are further than the margin."""
    _, outputs = masked_pass(problem.hooked, clean, masking, rounded=0.5)
    divergence = problem.divergence(clean.outputs, outputs)
    far = int((divergence > problem.margin).sum())
    if far:
        warnings.warn(
            f"at {masking.label} the masks of {far} of {len(divergence)} examples move the output further than the "
            f"margin of {problem.margin} nats, up to {divergence.max().item():.3g}. Give the recipe more steps or a "
            f"lower free_rate, or allow a larger margin.",
            MarginWarning,
            stacklevel=4,
        )


def begin(maskings: Sequence[Masks], clean: Clean) -> None:
    """Fresh free logits for one batch; baselines are started where no fit has done so."""
    for masking in [part for one in maskings for part in one.parts]:
        pattern, value = masking.site.gating(), clean.values[str(masking.site)]
        start(masking, sizes(masking, clean), value.device)
        known = pattern.shape(value)
        for vote in masking.votes:
            assert isinstance(vote.probe, FreeLogits)  # shared by tied maskings: the first one's sizes hold
            vote.probe.begin([known[axis] for axis in pattern.positions], value.device)
