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
from maskhooks.distributed.ranks import Pooled, Ranks
from maskhooks.errors import NonFiniteError
from maskhooks.hooks.port import Replacement
from maskhooks.hooks.replay import Replay
from maskhooks.masks.group import MaskingGroup, reads_of, sites_of
from maskhooks.masks.masking import Masking
from maskhooks.masks.samples import GateSamples, Masked
from maskhooks.model.outputs import sampled_log_prob
from maskhooks.model.task import move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.progress import track
from maskhooks.seeds import generator, seeded
from maskhooks.sites.site import Site
from maskhooks.training.global_batch import sharing
from maskhooks.training.problem import WARM, Problem

Effects = dict[Site, Float[Tensor, "*gated"]]
_SCALED_EVERY = 6  # batches between two masked passes that the estimate is compared with
_MEMORY = 0.8  # how much an older comparison still counts at the next one


def warm_start(
    problem: Problem, train: Epochs, closed: Sequence[float], replay: Replay | None, ranks: Ranks, progress: bool
) -> None:
    """Train the probes as the run will, but on an estimate of the divergence in place of a masked pass.

    To second order, closing gate i alone costs KL(y || y_masked) = 1/2 E[(d log p(y) / d z_i)^2] with y drawn from the
    model's own prediction: the diagonal of the Fisher information of the gates at z = 1 (Martens 2020, section 5). One
    backward pass gives it for every gate of every site. The estimate of a mask's divergence is the sum over gates of
    (1 - P(z_i != 0)) times this cost, times a scale per group: at first that of the fully masked model, then that of
    the present masks, whose divergence is measured every few batches.

    Several processes take their batches in turn, as in training; each draws its own y.

    Args:
        closed: for each group, the divergence of the fully masked model, in nats; a group whose divergence is not
            finite starts cold.
    """
    recipe, hooked = problem.recipe, problem.hooked
    starts = [_Start(problem, number, far, ranks) for number, far in enumerate(closed) if math.isfinite(far)]
    rounds = train.rounds
    total = recipe.warm_start_batches if rounds is None else min(rounds, recipe.warm_start_batches)
    batches = itertools.islice(train.batches_from(), total)
    for number, (_, _, batch) in enumerate(track(batches, "reading gradients", total=total, shown=progress)):
        torch.manual_seed(seeded(problem.seed, WARM, number, ranks.rank))
        clean, effects = None, {}
        if batch is not None:
            reads, sites = reads_of(problem.groups), sites_of(problem.groups)
            clean = clean_pass(hooked, move(batch, ranks.device), reads, sites, replay)
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

    def __init__(self, problem: Problem, number: int, closed: float, ranks: Ranks) -> None:
        self.recipe, self.seed, self.number, self.closed = problem.recipe, problem.seed, number, closed
        self.group, self.divergence, self.ranks = problem.groups[number], problem.divergence, ranks
        self.objective = copy.deepcopy(problem.objectives[number])  # the run's own one starts anew
        probes = {id(w): w for one in self.group.maskings for vote in one.votes for w in vote.probe.parameters()}
        self.weights = list(probes.values())
        self.optimizer = self.recipe.make_optimizer(self.weights, [])
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.measured, self.estimated = 0.0, 0.0  # divergences in nats, added up

    def descend(self, clean: Clean | None, effects: Effects, step: int, steps: int) -> None:
        """Make a step on one batch."""
        source = generator(self.seed, WARM, step, self.number)
        group = sharing(self.group, clean, self.ranks)
        with torch.enable_grad():
            masked = [] if clean is None else group.sample(clean.values, clean.places, source)
            pooled = self._pooled(masked, effects)
            estimate = pooled.divergence
            if not bool(torch.isfinite(estimate).all()):  # a gradient of the model overflows here
                return
            if step == 0 or step % _SCALED_EVERY == _SCALED_EVERY - 1:
                self._compare(clean, masked, pooled, first=step == 0)
            if not self.estimated:
                return
            divergence = self.measured / self.estimated * estimate
            self.optimizer.zero_grad()
            self.objective(pooled.samples, divergence, divergence).backward()
        self.ranks.add_gradients(self.weights)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.rate * self.recipe.rate(step, step / steps)
        self.optimizer.step()
        self.objective.ascend(divergence.detach())

    def _pooled(self, masked: Sequence[Masked], effects: Effects) -> Pooled:
        """Return the gates of the global batch with the estimate, unscaled, and with what closing all would cost."""
        own = None
        if masked:
            samples = masked[0] if len(masked) == 1 else GateSamples.flattened(masked)
            costs = [effects[site] for site in self.group.sites]
            cost = costs[0] if len(costs) == 1 else torch.cat([one.flatten() for one in costs])
            whole = samples.total(cost)
            own = Pooled(samples, samples.total(cost * (1 - samples.log_open.exp())), whole, whole)
        if self.ranks.world_size > 1:
            return self.ranks.pool(own)
        assert own is not None
        return own

    @torch.no_grad()
    def _compare(self, clean: Clean | None, masked: Sequence[Masked], pooled: Pooled, *, first: bool) -> None:
        """Compare the estimate with the divergence of the fully masked model at first, then with that of the masks."""
        if first:
            far, estimate = self.closed * len(pooled.penalty), pooled.penalty.sum().item()
        else:
            own = torch.zeros((), device=self.ranks.device)
            if clean is not None:
                with contextlib.suppress(NonFiniteError):
                    outputs = onward_pass(clean, self.group.replacements(masked))
                    own = self.divergence(clean.outputs, outputs).sum()
            far, estimate = self.ranks.all_reduce(own).item(), pooled.divergence.sum().item()
        if far > 0 and math.isfinite(far):
            self.measured = _MEMORY * self.measured + far
            self.estimated = _MEMORY * self.estimated + estimate
