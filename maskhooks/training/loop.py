"""The loop of a training run: the steps, on each rank.

All randomness comes from generators of (seed, purpose, step). The user's model is not trained: it is frozen, and
maskhooks, not Lightning, places it on the device.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning.fabric import Fabric
from torch import Tensor, nn

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import Pooled, Ranks
from maskhooks.errors import NonFiniteError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.group import MaskingGroup, by_shared_modules, reads_of, sites_of
from maskhooks.model.outputs import agreement
from maskhooks.model.task import move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.clean_cache import CleanCache, Numbered
from maskhooks.passes.masked import masked_pass
from maskhooks.progress import length
from maskhooks.runs.run_log import RunLog
from maskhooks.seeds import generator, seeded
from maskhooks.training.calibration import FURTHEST, Calibration, stuck
from maskhooks.training.checkpoint import Checkpoint
from maskhooks.training.evaluation import Evaluation
from maskhooks.training.global_batch import sharing
from maskhooks.training.objectives import Objective
from maskhooks.training.pace import Pace, Timing, interpolated
from maskhooks.training.problem import CHOOSE, MODEL, SAMPLE, VALIDATE, Problem
from maskhooks.training.run import FitResult

_RESTED = 0.7  # from this progress on, no group rests: as learning rates fall, all gain again


class Loop:
    """Draws groups of maskings for each step, trains them, and compares checkpoints.

    Args:
        problem: what is trained; its modules are started before the first step.
        fabric: Lightning's Fabric, launched.
        ranks: this process among the others.
        log: where rows go, besides `result`.
        pace: how far the run is.
        validation: batches on which checkpoints are compared, in the same order each time.
        cache: keeps clean passes across epochs.

    Attributes:
        on_validation_batch: called after each batch on which checkpoints are compared.
    """

    def __init__(
        self,
        problem: Problem,
        fabric: Fabric,
        ranks: Ranks,
        log: RunLog,
        *,
        pace: Pace,
        validation: Epochs | None = None,
        cache: CleanCache | None = None,
    ) -> None:
        self.problem, self.fabric, self.ranks, self.log = problem, fabric, ranks, log
        self.pace, self.validation, self.cache = pace, validation, cache
        self.replay = Replay(problem.hooked.model) if problem.recipe.replay else None
        self.evaluation = Evaluation(
            problem.hooked,
            problem.groups,
            problem.divergence,
            self._drawn,
            replay=self.replay,
            ranks=ranks,
        )
        self.checkpoints = [Checkpoint(group, problem.margin) for group in by_shared_modules(problem.groups)]
        self.result = FitResult()
        self.done = self.epoch = self.index = 0  # steps done; epoch and index of the next batch
        self.progress = 0.0  # how far the run is, from 0 to 1
        self.stale = 0  # validations in a row without a better checkpoint
        self.resting = pace.resting  # groups that no longer gain
        self.batch: Any = None  # the latest batch
        self.on_validation_batch: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Make the optimizer. The modules must be started."""
        maskings = self.problem.maskings
        baselines = [weight for masking in maskings for weight in masking.baseline.parameters()]
        probes = [weight for masking in maskings for vote in masking.votes for weight in vote.probe.parameters()]
        self.optimizer = self.problem.recipe.make_optimizer(_unique(probes), _unique(baselines))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, train: Epochs) -> Iterator[None]:
        """Make the remaining steps, yielding after each, until `result.stop_reason` says why the run ended.

        Raises:
            NonFiniteError: something was not finite; the modules hold the state before that step.
        """
        if self.result.stop_reason:
            return
        optimizer = self.fabric.setup_optimizers(self.optimizer)
        for epoch, index, batch in train.batches_from(self.epoch, self.index):
            self.epoch, self.index, self.batch = epoch, index, batch
            torch.manual_seed(seeded(self.problem.seed, MODEL, self.done))
            self._step(move(batch, self.ranks.device), optimizer)
            self.done, self.index = self.done + 1, self.index + 1
            self._advance()
            if self.resting and self.progress >= _RESTED:
                self.resting.clear()
            if self.validation is not None and self.pace.due(self.progress):
                self._validate(self.validation)
            if self.progress >= 1 and not self.result.stop_reason:
                self.result.stop_reason = self.pace.end(self.done)
            self.result.seconds = self.pace.elapsed
            yield
            if self.result.stop_reason:
                return

    def rehearse(self, train: Epochs) -> None:
        """Time a clean pass, and a step of the first and of the last group, without learning anything from them."""
        batch = move(next(train.batches_from())[2], self.ranks.device)
        groups, timings = self.problem.groups, []
        for number in (0, len(groups) - 1):
            self.optimizer.zero_grad()
            with self.fabric.autocast():
                clean = None if batch is None else self._compute(batch, groups)
            timings.append(Timing())
            with timings[-1].timed():
                self._backward(clean, number, seeded(self.problem.seed, SAMPLE))
        self.optimizer.zero_grad()
        self.pace.steps = interpolated(timings[0].mean, timings[1].mean, len(groups))
        if self.validation is not None:
            self._rehearse_check(self.validation)

    def _rehearse_check(self, batches: Epochs) -> None:
        """Estimate how long comparing checkpoints takes, from a clean pass of a validation batch."""
        checked, (_, batch) = length(batches.batches), next(batches.first_epoch(), (0, None))
        if checked is not None and batch is not None:
            timing, groups = Timing(), self.problem.groups
            with timing.timed(), self.fabric.autocast():
                clean_pass(
                    self.problem.hooked,
                    move(batch, self.ranks.device),
                    reads_of(groups),
                    sites_of(groups),
                    self.replay,
                )
            masked = sum(one.mean for one in self.pace.steps) / 2  # a training step without its backward half
            larger = timing.mean / self.pace.clean.mean if self.pace.clean.mean else 1.0
            self.pace.check.mean = checked * (timing.mean + larger * masked)
        self.pace.check.mean = self.ranks.broadcast(self.pace.check.mean)

    def _advance(self) -> None:
        """Note how far the run is; with a budget, all ranks go by the first one's clock."""
        progress = self.pace.progress(self.done)
        self.progress = progress if self.pace.budget is None else self.ranks.broadcast(progress)

    def _step(self, batch: Any, optimizer: Any) -> None:
        problem, step = self.problem, self.done
        chosen = self._choose(step)
        with self.fabric.autocast():
            clean = None if batch is None else self._clean(batch, [problem.groups[number] for number in chosen])
        begun = time.monotonic()
        self.optimizer.zero_grad()
        steps = [self._backward(clean, number, step) for number in chosen]
        weights = _unique([w for group, *_ in steps for module in group.modules for w in module.parameters()])
        self.ranks.add_gradients(weights)
        self._check_gradients(weights, [group for group, *_ in steps])
        for settings, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            settings["lr"] = rate * problem.recipe.rate(step, self.progress)
        optimizer.step()
        for group, objective, pooled in steps:
            self._note(group, objective, pooled)
            objective.ascend(pooled.divergence.detach())
        for number in chosen:
            self.pace.steps[number].add((time.monotonic() - begun) / len(chosen))

    def _choose(self, step: int) -> list[int]:
        """Draw the groups of a step; groups that rest are drawn only if all do."""
        source = generator(self.problem.seed, CHOOSE, step)
        order = torch.randperm(self._joined(), generator=source).tolist()
        return ([number for number in order if number not in self.resting] or order)[: self.pace.together]

    def _backward(self, clean: Clean | None, number: int, step: int) -> tuple[MaskingGroup, Objective, Pooled]:
        """Add the gradients of a group's loss."""
        group, objective = self._staged(self.problem.groups[number]), self.problem.objectives[number]
        with contextlib.ExitStack() as held:
            with self.fabric.autocast():
                pooled = self._masked(clean, group, generator(self.problem.seed, SAMPLE, step, number), held)
                loss = objective(pooled.samples, pooled.divergence, pooled.penalty)
            if loss.requires_grad:
                self.fabric.backward(loss)
        self._check_loss(loss, group)
        return group, objective, pooled

    def _rest(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Let groups rest that gained too little since the last validation, until the last part of the run.

        Args:
            rows: a row per group of this validation.
        """
        recipe, before = self.problem.recipe, self.result.validation[-len(rows) :]
        apart = len(self.checkpoints) == len(rows)
        if before and recipe.least_gain and apart and self.progress < _RESTED:
            for number, (last, row) in enumerate(zip(before, rows, strict=True)):
                within = max(last["divergence"], row["divergence"]) <= self.problem.margin
                if within and last["expected_l0"] - row["expected_l0"] < recipe.least_gain:
                    self.resting.add(number)

    def _release(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Close masks a little that are stuck open: they keep most positions at next to no divergence.

        At the upper end of the logits, gradients are small, and an optimizer that remembers large ones hardly moves.

        Args:
            rows: a row per group of this validation.
        """
        if self.problem.recipe.calibrations and self.progress < 1:
            for group, row in zip(self.problem.groups, rows, strict=True):
                if group in self._alone() and stuck(row, self.problem.margin):
                    group.shift_logits(-FURTHEST)

    def _joined(self) -> int:
        """Return how many groups take part in this step; groups that share modules join one after another."""
        count, over = len(self.problem.groups), self.problem.recipe.layer_warmup
        if len(self.checkpoints) == count or self.progress >= over:
            return count
        return min(count, 1 + int(count * self.progress / over))

    def _staged(self, group: MaskingGroup) -> MaskingGroup:
        """Return the part of a group that takes part in this step."""
        over = self.problem.recipe.layer_warmup
        return group.last_depths(self.progress / over) if self.progress < over else group

    def _masked(
        self, clean: Clean | None, group: MaskingGroup, source: torch.Generator, held: contextlib.ExitStack
    ) -> Pooled:
        """Run a masked pass of the global batch, of which this rank computes its own examples."""
        if self.ranks.world_size == 1:
            assert clean is not None
            return self._own(clean, group, source, held)
        shared = sharing(group, clean, self.ranks)
        try:
            own = None if clean is None else self._own(clean, shared, source, held)
        except NonFiniteError:
            own = self.ranks.not_a_number()  # all ranks must end together
        return self.ranks.pool(own)

    def _own(self, clean: Clean, group: MaskingGroup, source: torch.Generator, held: contextlib.ExitStack) -> Pooled:
        try:
            samples, outputs = masked_pass(clean, group, source, held=held)
        except NonFiniteError as error:
            raise self._not_finite("the masked output", group) from error
        divergence = self.problem.divergence(clean.outputs, outputs)
        penalty = self.problem.penalty(clean.outputs, outputs, divergence)
        return Pooled(samples, divergence, penalty, agreement(clean.outputs, outputs))

    def _clean(self, batch: Any, chosen: Sequence[MaskingGroup]) -> Clean:
        """Run a clean pass, which reads what the groups need and records what their masked passes skip."""
        if self.cache is None:
            return self._compute(batch, chosen)
        assert isinstance(batch, Numbered)
        self.pace.computed = self.cache.missing
        if batch.number not in self.cache:
            return self._compute(batch.batch, chosen)
        reads, sites = reads_of(chosen), sites_of(chosen)
        every = self.problem.groups
        return self.cache.clean(self.problem.hooked, batch, lambda: self._compute(batch.batch, every), reads, sites)

    def _compute(self, batch: Any, groups: Sequence[MaskingGroup]) -> Clean:
        with self.pace.clean.timed():
            return clean_pass(self.problem.hooked, batch, reads_of(groups), sites_of(groups), self.replay)

    def _check_loss(self, loss: Float[Tensor, ""], group: MaskingGroup) -> None:
        if not torch.isfinite(loss):
            raise self._not_finite("the loss", group)

    def _check_gradients(self, weights: list[nn.Parameter], groups: Sequence[MaskingGroup]) -> None:
        if getattr(self.fabric.strategy.precision, "scaler", None) is not None:
            return  # in float16, gradients overflow at times; the scaler skips such a step
        bad = {id(w) for w in weights if w.grad is not None and not bool(torch.isfinite(w.grad).all())}
        if bad:
            own = [g for g in groups if any(id(w) in bad for module in g.modules for w in module.parameters())]
            raise self._not_finite("a gradient", own[0])

    def _not_finite(self, what: str, group: MaskingGroup) -> NonFiniteError:
        return NonFiniteError(
            f"{what} is not finite at step {self.done} on {group}. The last good state was kept, so the explainer "
            f"can be used. Check the model's outputs on this batch, lower the learning rate, or mask other sites.",
            site=group.sites[0],
        )

    @torch.no_grad()
    def _note(self, group: MaskingGroup, objective: Objective, pooled: Pooled) -> None:
        row = {
            "step": self.done,
            "epoch": self.epoch,
            "site": group.label,
            "depth": group.depth,
            "multiplier": objective.multiplier.item(),
            "divergence": pooled.divergence.mean().item(),
            "expected_l0": pooled.samples.expected_l0.mean().item(),
            "agreement": pooled.agreement.mean().item(),
        }
        self.result.log.append(row)
        self.log.write("log", row)

    @torch.no_grad()
    def _validate(self, batches: Epochs) -> None:
        groups, recipe = self.problem.groups, self.problem.recipe
        # several draws cost at most as much as the steps between two validations
        planned = self.ranks.broadcast(self.pace.planned(self.done))  # by the first rank's clock
        interval = max(1, planned // self.pace.checks)
        self.evaluation.passes = interval * self.pace.together
        if self.progress >= 1 and recipe.sharpness != 1:
            for one in self._alone():
                one.sharpen(recipe.sharpness)
        with self.pace.check.timed(), self.fabric.autocast():
            found = self._measured(batches)
        if self.progress >= 1:
            found = self._calibrated(found, batches)
        self.pace.note_check(self.progress)
        self._rest(found)
        rows = {id(group): {"step": self.done, **row} for group, row in zip(groups, found, strict=True)}
        for row in rows.values():
            self.result.validation.append(row)
            self.log.write("validation", row)
        better = [c.compare(self.done, [rows[id(group)] for group in c.groups]) for c in self.checkpoints]
        self._release(found)
        self.stale = 0 if any(better) else self.stale + 1
        if recipe.patience is not None and self.stale >= recipe.patience:
            self.result.stop_reason = f"no better checkpoint in {recipe.patience} validations"

    def _measured(self, batches: Epochs, only: Sequence[int] | None = None) -> list[dict[str, Any]]:
        return self.evaluation.rows(self._for_validation(batches), only)

    def _for_validation(self, batches: Epochs) -> Iterator[tuple[int, Any]]:
        for number, batch in batches.first_epoch():
            yield number, move(batch, self.ranks.device)
            self.on_validation_batch()

    def _calibrated(self, rows: Sequence[dict[str, Any]], batches: Epochs) -> list[dict[str, Any]]:
        """Shift the logits of each group towards the margin; return the rows of the states that remain."""
        groups, margin, sharpness = self.problem.groups, self.problem.margin, self.problem.recipe.sharpness
        alone = self._alone()
        shifts = {n: Calibration(groups[n], margin, row, sharpness) for n, row in enumerate(rows) if groups[n] in alone}
        for _ in range(self.pace.calibrations):
            due = [number for number, shift in shifts.items() if shift.due]
            if not due:
                break
            for number in due:
                shifts[number].move()
            try:
                with self.fabric.autocast():
                    found = self._measured(batches, due)
            except NonFiniteError:  # with these shifts the model overflows
                if self.ranks.world_size > 1:
                    raise
                break
            for number, row in zip(due, found, strict=True):
                shifts[number].note(row)
        return [dict(shifts[n].settle()) if n in shifts else row for n, row in enumerate(rows)]

    def _alone(self) -> list[MaskingGroup]:
        """Return the groups that share no modules with others; none without a margin, to which they could be moved."""
        if not math.isfinite(self.problem.margin):
            return []
        return [one.groups[0] for one in self.checkpoints if len(one.groups) == 1]

    def _drawn(self, number: int, *others: int) -> torch.Generator:
        """Return the generator of the gate samples for a validation batch, the same for all checkpoints."""
        return generator(seeded(self.problem.seed, VALIDATE, number), *others)

    def finish(self) -> FitResult:
        """Restore the chosen states and return the result."""
        if self.result.validation:
            for checkpoint in self.checkpoints:
                checkpoint.restore()
                self.result.chosen_steps.update({str(group): checkpoint.step or 0 for group in checkpoint.groups})
            self.result.over_margin = [str(checkpoint) for checkpoint in self.checkpoints if not checkpoint.within]
            self.result.within_margin = not self.result.over_margin
        return self.result


def _unique(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
