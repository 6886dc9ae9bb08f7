"""Per-example logits (unamortised): optimise the gates of one batch directly."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from maskhooks.checks.doctor import check_gradients
from maskhooks.errors import MarginWarning
from maskhooks.hooks.replay import Replay
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.probes import PerExampleLogits
from maskhooks.masks.samples import GateSamples, Masked
from maskhooks.passes.clean import Clean
from maskhooks.passes.masked import masked_pass, onward_pass
from maskhooks.seeds import generator
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.training.copies import Copies, Estimate
from maskhooks.training.objectives import Objective
from maskhooks.training.preparation import closed_divergence
from maskhooks.training.problem import Problem

_EXPLAIN, _START, _DRAW = 101, 103, 104
_DRAWS = 16  # samples that judge the result of a restart


def pathwise(
    problem: Problem, clean: Clean, group: MaskingGroup, source: Generator, held: contextlib.ExitStack
) -> tuple[GateSamples, Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return a gate sample, its divergence and its penalty, with gradients through the model to the gates."""
    samples, outputs = masked_pass(clean, group, source, held=held)
    divergence = problem.divergence(clean.outputs, outputs)
    return samples, divergence, problem.penalty(clean.outputs, outputs, divergence)


class ScoreFunction:
    """REINFORCE (Williams 1992): samples, divergence and penalty, without gradients through the model.

    The gradient of the expected penalty P is the expected gradient of (P - b) log p(z), for any b that does not depend
    on the sample z. b is the moving average of P over the previous steps.

    Args:
        memory: decay of the moving average.
    """

    def __init__(self, memory: float = 0.9) -> None:
        self.memory = memory
        self._sum: Float[Tensor, " batch"] | None = None
        self._weight = 0.0

    def __call__(
        self, problem: Problem, clean: Clean, group: MaskingGroup, source: Generator, held: contextlib.ExitStack
    ) -> tuple[GateSamples, Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return a gate sample, its divergence, and a number with the gradient of the expected penalty."""
        masked = group.sample(clean.values, clean.places, source)
        with torch.no_grad():
            outputs = onward_pass(clean, group.replacements(masked))
            divergence = problem.divergence(clean.outputs, outputs)
            penalty = problem.penalty(clean.outputs, outputs, divergence)
        reward = penalty - self._average(penalty)
        return GateSamples.flattened(masked), divergence, reward * self._log_prob(clean, group, masked)

    def _average(self, penalty: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the average before this step, then update it."""
        before = torch.zeros_like(penalty) if self._sum is None else self._sum / self._weight
        held = torch.zeros_like(penalty) if self._sum is None else self._sum
        self._sum = self.memory * held + (1 - self.memory) * penalty
        self._weight = self.memory * self._weight + 1 - self.memory
        return before

    def _log_prob(self, clean: Clean, group: MaskingGroup, masked: Sequence[Masked]) -> Float[Tensor, " batch"]:
        """Return log p(z) of each example's gates, in nats."""
        terms = []
        for masking, one in zip(group.maskings, masked, strict=True):
            (logits,) = masking.logits(clean.values, clean.places[masking.site].units)
            terms.append(one.total(masking.gate.log_prob(one.sample.detach(), logits)))
        return torch.stack(terms).sum(0)


def optimise(
    problem: Problem,
    clean: Clean,
    estimator: Callable[[], Estimate] = lambda: pathwise,
    replay: Replay | None = None,
    checked: set[str] | None = None,
) -> None:
    """Create per-example logits for one batch and optimise them for the recipe's steps, with a multiplier per example.

    Of several restarts, each example keeps the logits whose samples are sparsest with a mean divergence within the
    margin, or else the closest to the margin.

    Args:
        estimator: makes the function that samples the gates, once per restart.
        replay: what records the clean pass of a batch of copies, for several samples in one step.
        checked: the groups to whose sites gradients are known to come back; the others are tried, and added.

    Raises:
        GradientError: a site affects the output, but gets no gradient.

    Warns:
        MarginWarning: the masks of some examples exceed the margin.
    """
    recipe = problem.recipe
    for number, (group, objective) in enumerate(zip(problem.groups, problem.objectives, strict=True)):
        chosen: Chosen | None = None
        for attempt in range(recipe.restarts):
            begin(group, clean, generator(problem.seed, _START, number, attempt))
            _descend(problem, clean, group, objective, (number, attempt), estimator(), replay, checked)
            if recipe.restarts > 1:
                found = Chosen.of(problem, clean, group, generator(problem.seed, _DRAW, number, attempt))
                chosen = found if chosen is None else chosen.or_better(found)
        if chosen is not None:
            chosen.put()
        if math.isfinite(problem.margin):
            _check_margin(problem, group, clean)


def _descend(
    problem: Problem,
    clean: Clean,
    group: MaskingGroup,
    objective: Objective,
    numbers: tuple[int, ...],
    estimate: Estimate,
    replay: Replay | None,
    checked: set[str] | None,
) -> None:
    """Optimise once; the gates' temperature falls to their own."""
    recipe, gates = problem.recipe, [masking.gate for masking in group.maskings]
    copies = Copies(estimate, clean, group, recipe.samples, replay)
    closed = closed_divergence(clean, group, problem.divergence)
    objective.start(closed)
    if not bool(closed.any()):  # closing everything changes nothing, and there may be no gradient
        with torch.no_grad():
            for probe, _ in _probes(clean, group):
                probe.logits.fill_(probe.min_logit)
        return
    needed = not math.isfinite(problem.margin) or bool((closed > problem.margin).any())
    known = "gradients" in problem.hooked.skipped_checks or (checked is not None and group.label in checked)
    if estimate is pathwise and needed and not known:  # otherwise no position is needed, and no gradient either
        check_gradients(problem.hooked, clean.batch, group.sites)
        if checked is not None:
            checked.add(group.label)
    logits = [weight for probe, _ in _probes(clean, group) for weight in probe.parameters()]
    optimizer = recipe.make_logit_optimizer(logits)
    try:
        for step in range(recipe.steps):
            for masking, gate in zip(group.maskings, gates, strict=True):
                masking.gate = gate.tempered(recipe.initial_temperature ** (1 - step / recipe.steps))
            source = generator(problem.seed, _EXPLAIN, *numbers, step)
            optimizer.zero_grad()
            with torch.enable_grad(), contextlib.ExitStack() as held:
                samples, divergence, penalty = copies(problem, group, source, held)
                objective(samples, divergence, penalty).backward()
            optimizer.param_groups[0]["lr"] = recipe.logit_learning_rate * recipe.rate(step, step / recipe.steps)
            optimizer.step()
            objective.ascend(divergence)
    finally:
        for masking, gate in zip(group.maskings, gates, strict=True):
            masking.gate = gate


@dataclass
class Chosen:
    """The best per-example logits so far, and what samples of them do on average.

    Attributes:
        probes: the probes that hold per-example logits, each with the example index of its rows.
        logits: the logits of each probe.
        far: by how much the divergence exceeds the margin, in nats, shape `(batch,)`.
        kept: the expected fraction kept.
    """

    probes: Sequence[tuple[PerExampleLogits, ExampleIndex | None]]
    logits: list[Float[Tensor, "..."]]
    far: Float[Tensor, " batch"]
    kept: Float[Tensor, " batch"]

    @classmethod
    @torch.no_grad()
    def of(cls, problem: Problem, clean: Clean, group: MaskingGroup, source: Generator) -> Chosen:
        """Return the logits as they are now, judged by samples."""
        divergences = []
        for _ in range(_DRAWS):
            samples, outputs = masked_pass(clean, group, source)
            divergences.append(problem.divergence(clean.outputs, outputs))
        far = (torch.stack(divergences).mean(0) - problem.margin).clamp(min=0)
        probes = _probes(clean, group)
        return cls(probes, [probe.logits.detach().clone() for probe, _ in probes], far, samples.expected_l0)

    def or_better(self, other: Chosen) -> Chosen:
        """Return for each example the better logits of the two."""
        better = (other.far < self.far) | ((other.far == self.far) & (other.kept < self.kept))
        logits = []
        for (_, examples), mine, others in zip(self.probes, self.logits, other.logits, strict=True):
            rows = better if examples is None else better[examples.index]
            logits.append(torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), others, mine))
        far, kept = (torch.where(better, b, a) for a, b in ((self.far, other.far), (self.kept, other.kept)))
        return Chosen(self.probes, logits, far, kept)

    @torch.no_grad()
    def put(self) -> None:
        """Load these logits into the probes."""
        for (probe, _), logits in zip(self.probes, self.logits, strict=True):
            probe.logits.copy_(logits)


@torch.no_grad()
def _check_margin(problem: Problem, group: MaskingGroup, clean: Clean) -> None:
    """Warn with MarginWarning if examples exceed the margin with gates rounded at one half."""
    _, outputs = masked_pass(clean, group, rounded=0.5)
    divergence = problem.divergence(clean.outputs, outputs)
    far = int((divergence > problem.margin).sum())
    if far:
        warnings.warn(
            f"at {group.label} the masks of {far} of {len(divergence)} examples exceed the margin of {problem.margin} "
            f"nats, with divergences up to {divergence.max().item():.3g}. Give the recipe more steps or a lower "
            f"logit_learning_rate, or allow a larger margin.",
            MarginWarning,
            stacklevel=4,
        )


def begin(group: MaskingGroup, clean: Clean, source: Generator | None = None) -> None:
    """Create per-example logits for one batch, and start baselines that no fit has started.

    Args:
        source: generator of the initial logits, if the recipe draws them at random.
    """
    for masking in group.maskings:
        pattern, value = masking.pattern, clean.values[masking.site]
        masking.start(masking.sizes_for(clean.values), value.device)
        known = pattern.shape(value)
        for vote in masking.votes:
            assert isinstance(vote.probe, PerExampleLogits)  # shared by tied maskings: the last one's sizes hold
            vote.probe.begin([known[axis] for axis in pattern.positions], value.device, source)


def _probes(clean: Clean, group: MaskingGroup) -> list[tuple[PerExampleLogits, ExampleIndex | None]]:
    """Return the probes that hold per-example logits, each once, with the example index of each row."""
    found = {}
    for masking in group.maskings:
        for vote in masking.votes:
            assert isinstance(vote.probe, PerExampleLogits)
            found[id(vote.probe)] = (vote.probe, clean.places[masking.site].example_index)
    return list(found.values())
