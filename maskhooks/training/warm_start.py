"""Warm start: train probes on an estimate of the divergence that costs one backward pass for all sites together."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import Ranks
from maskhooks.hooks.port import Replacement
from maskhooks.masks.group import MaskingGroup, reads_of, sites_of
from maskhooks.masks.masking import Masking
from maskhooks.masks.samples import GateSamples
from maskhooks.model.outputs import sampled_log_prob
from maskhooks.model.task import move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.progress import length, track
from maskhooks.seeds import generator, seeded
from maskhooks.sites.site import Site
from maskhooks.training.problem import WARM, Problem

Effects = dict[Site, Float[Tensor, "*gated"]]


def warm_start(problem: Problem, train: Epochs, closed: Sequence[float], ranks: Ranks, progress: bool) -> None:
    """Train the probes as the run will, but on an estimate of the divergence in place of a masked pass.

    To second order, closing gate i alone costs KL(y || y_masked) = 1/2 E[(d log p(y) / d z_i)^2] with y drawn from the
    model's own prediction: the diagonal of the Fisher information of the gates at z = 1 (Martens 2020, section 5). One
    backward pass gives it for every gate of every site. The estimate of a mask's divergence is the sum over gates of
    (1 - P(z_i != 0)) times this cost, scaled so that it is exact, on average, for the fully masked model.

    Args:
        closed: for each group, the divergence of the fully masked model, in nats; a group whose divergence is not
            finite starts cold.
    """
    recipe, hooked = problem.recipe, problem.hooked
    starts = [_Start(problem, number, far) for number, far in enumerate(closed) if math.isfinite(far)]
    batches = itertools.islice(train.batches, recipe.warm_start_batches)
    known = length(train.batches)
    total = recipe.warm_start_batches if known is None else min(known, recipe.warm_start_batches)
    for number, batch in enumerate(track(batches, "reading gradients", total=total, shown=progress)):
        torch.manual_seed(seeded(problem.seed, WARM, number))
        clean = clean_pass(hooked, move(batch, ranks.device), reads_of(problem.groups), sites_of(problem.groups))
        effects = gate_effects(clean, problem.maskings)
        for start in starts:
            start.descend(clean, effects, number, total)
    for start in starts:
        start.optimizer.zero_grad()


def gate_effects(clean: Clean, maskings: Sequence[Masking]) -> Effects:
    """Return for each site what closing each gate alone costs, in nats, to second order; 0 at padding.

    Maskings of one site have one effect, with the baseline of the first.
    """
    first = {masking.site: masking for masking in reversed(maskings)}
    gates: Effects = {}
    replaced: dict[Site, Replacement] = {}
    for site in sites_of([MaskingGroup([one]) for one in maskings]):
        masking, value = first[site], clean.values[site]
        gates[site] = torch.ones(masking.pattern.mask_shape(value), device=value.device, requires_grad=True)
        with torch.enable_grad():
            replaced[site] = masking.replacement(masking.mask(value, clean.places[site], gates[site]))
    with torch.enable_grad(), contextlib.ExitStack() as held:
        sampled_log_prob(onward_pass(clean, replaced, held)).sum().backward()
    return {
        site: torch.zeros_like(gate) if gate.grad is None else (gate.grad**2 / 2).detach()
        for site, gate in gates.items()
    }


class _Start:
    """The training of one group's probes on the estimate."""

    def __init__(self, problem: Problem, number: int, closed: float) -> None:
        self.recipe, self.seed, self.number, self.closed = problem.recipe, problem.seed, number, closed
        self.group = problem.groups[number]
        self.objective = copy.deepcopy(problem.objectives[number])  # the run's own one starts anew
        probes = {id(w): w for one in self.group.maskings for vote in one.votes for w in vote.probe.parameters()}
        self.optimizer = self.recipe.make_optimizer(list(probes.values()), [])
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.total, self.examples = 0.0, 0

    def descend(self, clean: Clean, effects: Effects, step: int, steps: int) -> None:
        """Make a step on one batch."""
        source = generator(self.seed, WARM, step, self.number)
        with torch.enable_grad():
            masked = self.group.sample(clean.values, clean.places, source)
            samples = masked[0] if len(masked) == 1 else GateSamples.flattened(masked)
            costs = [effects[site] for site in self.group.sites]
            cost = costs[0] if len(costs) == 1 else torch.cat([one.flatten() for one in costs])
            whole = samples.total(cost)
            if not bool(torch.isfinite(whole).all()):  # a gradient of the model overflows here
                return
            self.total, self.examples = self.total + whole.sum().item(), self.examples + len(whole)
            if not self.total:
                return
            scale = self.closed * self.examples / self.total
            divergence = scale * samples.total(cost * (1 - samples.log_open.exp()))
            self.optimizer.zero_grad()
            self.objective(samples, divergence, divergence).backward()
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.rate * self.recipe.rate(step, step / steps)
        self.optimizer.step()
        self.objective.ascend(divergence.detach())
