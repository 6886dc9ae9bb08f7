"""Warm start: train probes on an estimate of the divergence that costs one backward pass for all sites together."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
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
from maskhooks.passes.masked import masked_pass, onward_pass
from maskhooks.progress import track
from maskhooks.seeds import generator, seeded
from maskhooks.sites.site import Site
from maskhooks.training.global_batch import sharing
from maskhooks.training.problem import WARM, Problem

Effects = dict[Site, Float[Tensor, "*gated"]]
_BATCHES = 4  # on which the first masked passes are made
_LOWEST, _HIGHEST, _HALVINGS = -2.0, 6.0, 6  # how far logits may be shifted, and how finely
_STEP = 0.5  # to both sides, for the slope of the penalty


def warm_start(
    problem: Problem,
    train: Epochs,
    closed: Sequence[float],
    replay: Replay | None,
    ranks: Ranks,
    progress: bool,
    seconds: float = math.inf,
) -> None:
    """Train the probes as the run will, but on an estimate of the divergence in place of a masked pass.

    To second order, closing gate i alone costs KL(y || y_masked) = 1/2 E[(d log p(y) / d z_i)^2] with y drawn from the
    model's own prediction: the diagonal of the Fisher information of the gates at z = 1 (Martens 2020, section 5). One
    backward pass gives it for every gate of every site. The estimate of a mask's divergence is the sum over gates of
    (1 - P(z_i != 0)) times this cost, scaled so that it is exact, on average, for the fully masked model.

    An estimate can be far off for the masks that are learned from it, so at the end all logits of a group are shifted
    by a number that brings the divergence of its masked passes to the target.

    Several processes take their batches in turn, as in training; each draws its own y.

    Args:
        closed: for each group, the divergence of the fully masked model, in nats; a group whose divergence is not
            finite starts cold. So does a tied group, whose gates close at several sites at once.
        seconds: the time for reading gradients, after which no more batches are read.
    """
    recipe, hooked = problem.recipe, problem.hooked
    warm = [n for n, far in enumerate(closed) if math.isfinite(far) and not problem.groups[n].tied]
    starts = [_Start(problem, number, closed[number], ranks) for number in warm]
    rounds = train.rounds
    total = recipe.warm_start_batches if rounds is None else min(rounds, recipe.warm_start_batches)
    batches = itertools.islice(train.batches_from(), total)
    kept: list[Clean | None] = []
    begun = time.monotonic()
    for number, (_, _, batch) in enumerate(track(batches, "reading gradients", total=total, shown=progress)):
        torch.manual_seed(seeded(problem.seed, WARM, number, ranks.rank))
        clean, effects = None, {}
        if batch is not None:
            reads, sites = reads_of(problem.groups), sites_of(problem.groups)
            clean = clean_pass(hooked, move(batch, ranks.device), reads, sites, replay)
            effects = gate_effects(clean, problem.maskings)
        if number < _BATCHES:
            kept.append(clean)
        done = ranks.broadcast(max(number / total, (time.monotonic() - begun) / seconds))
        for start in starts:
            start.descend(clean, effects, number, min(1.0, done))
        if done >= 1:
            break
    for start in starts:
        start.optimizer.zero_grad()
        start.meet_target(kept)


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
        self.group, self.ranks = problem.groups[number], ranks
        self.divergence, self.penalty = problem.divergence, problem.penalty
        self.own_objective = problem.objectives[number]  # of the run: it starts anew
        self.objective = copy.deepcopy(self.own_objective)
        probes = {id(w): w for one in self.group.maskings for vote in one.votes for w in vote.probe.parameters()}
        self.weights = list(probes.values())
        self.optimizer = self.recipe.make_optimizer(self.weights, [])
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.total, self.examples = 0.0, 0  # nats that closing every gate would cost by the estimate, unscaled

    def descend(self, clean: Clean | None, effects: Effects, step: int, progress: float) -> None:
        """Make a step on one batch; progress is from 0 to 1."""
        source = generator(self.seed, WARM, step, self.number)
        group = sharing(self.group, clean, self.ranks)
        with torch.enable_grad():
            masked = [] if clean is None else group.sample(clean.values, clean.places, source)
            pooled = self._pooled(masked, effects)
            if not bool(torch.isfinite(pooled.penalty).all()):  # a gradient of the model overflows here
                return
            self.total, self.examples = self.total + pooled.penalty.sum().item(), self.examples + len(pooled.penalty)
            if not self.total:
                return
            divergence = self.closed * self.examples / self.total * pooled.divergence
            self.optimizer.zero_grad()
            self.objective(pooled.samples, divergence, divergence).backward()
        self.ranks.add_gradients(self.weights)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.rate * self.recipe.rate(step, progress)
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
    def meet_target(self, batches: Sequence[Clean | None]) -> None:
        """Shift the logits so that the mean divergence of masked passes is the target, and level the multiplier."""
        low, high = _LOWEST, _HIGHEST
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            far = self._measured(batches, middle)[0]
            low, high = (middle, high) if far > self.objective.target else (low, middle)
        _, open_penalty, open_kept = self._measured(batches, high + _STEP)
        _, shut_penalty, shut_kept = self._measured(batches, high - _STEP)
        self.group.shift_logits(high)
        slope = (shut_penalty - open_penalty) / max(open_kept - shut_kept, 1e-6)
        if 0 < slope < math.inf:
            self.own_objective.level(slope)

    def _measured(self, batches: Sequence[Clean | None], shift: float) -> tuple[float, float, float]:
        """Return the mean divergence, penalty (nats) and fraction kept with logits shifted; infinite if not finite."""
        self.group.shift_logits(shift)
        total = torch.zeros(4)
        for number, clean in enumerate(batches):
            group, source = sharing(self.group, clean, self.ranks), generator(self.seed, WARM, number, self.number)
            if clean is not None:
                try:
                    samples, outputs = masked_pass(clean, group, source)
                except NonFiniteError:
                    total[0] = math.inf
                    continue
                far = self.divergence(clean.outputs, outputs)
                charged, kept = self.penalty(clean.outputs, outputs, far), samples.expected_l0
                total += torch.tensor([far.sum(), charged.sum(), kept.sum(), len(far)])
        self.group.shift_logits(-shift)
        *sums, examples = self.ranks.all_reduce(total.to(self.ranks.device)).tolist()
        means = [one / max(examples, 1) if math.isfinite(one) else math.inf for one in sums]
        return means[0], means[1], means[2]
