"""The loop of a training run: the steps, on each rank.

All randomness comes from generators of (seed, purpose, step). The user's model is not trained: it is frozen, and
maskhooks, not Lightning, places it on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning.fabric import Fabric
from torch import Tensor, nn

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import Pooled, Ranks, Shard
from maskhooks.errors import NonFiniteError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.group import MaskingGroup, reads_of, sites_of
from maskhooks.masks.masking import Masking
from maskhooks.model.outputs import agreement
from maskhooks.model.task import move
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.clean_cache import CleanCache, Numbered
from maskhooks.passes.masked import masked_pass
from maskhooks.runs.run_log import RunLog
from maskhooks.seeds import generator, seeded
from maskhooks.training.checkpoint import Checkpoint, by_shared_modules
from maskhooks.training.evaluation import Evaluation
from maskhooks.training.objectives import Objective
from maskhooks.training.problem import CHOOSE, MODEL, SAMPLE, VALIDATE, Problem
from maskhooks.training.run import FitResult


class Loop:
    """Draws groups of maskings for each step, trains them, and compares checkpoints.

    Args:
        problem: what is trained; its modules are started before the first step.
        fabric: Lightning's Fabric, launched.
        ranks: this process among the others.
        log: where rows go, besides `result`.
        total: the total number of steps.
        validation: batches on which checkpoints are compared, in the same order each time.
        cache: keeps clean passes across epochs.
    """

    def __init__(
        self,
        problem: Problem,
        fabric: Fabric,
        ranks: Ranks,
        log: RunLog,
        *,
        total: int,
        validation: Epochs | None = None,
        cache: CleanCache | None = None,
    ) -> None:
        self.problem, self.fabric, self.ranks, self.log = problem, fabric, ranks, log
        self.total, self.validation, self.cache = total, validation, cache
        self.interval = max(1, total // problem.recipe.validations)
        self.replay = Replay(problem.hooked.model) if problem.recipe.replay else None
        self.evaluation = Evaluation(
            problem.hooked,
            problem.groups,
            problem.divergence,
            self._drawn,
            replay=self.replay,
            ranks=ranks,
            # several draws cost at most as much as the steps between two validations
            passes=self.interval * problem.recipe.maskings_per_step,
        )
        self.checkpoints = [Checkpoint(group, problem.margin) for group in by_shared_modules(problem.groups)]
        self.result = FitResult()
        self.done = self.epoch = self.index = 0  # steps done; epoch and index of the next batch
        self.stale = 0  # validations in a row without a better checkpoint
        self.batch: Any = None  # the latest batch

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
            if self.validation is not None and (self.done % self.interval == 0 or self.done == self.total):
                self._validate(self.validation)
            if self.done >= self.total and not self.result.stop_reason:
                self.result.stop_reason = f"all {self.total} steps were done"
            yield
            if self.result.stop_reason:
                return

    def _step(self, batch: Any, optimizer: Any) -> None:
        problem, step = self.problem, self.done
        order = torch.randperm(self._joined(), generator=generator(problem.seed, CHOOSE, step))
        chosen = order[: problem.recipe.maskings_per_step].tolist()
        with self.fabric.autocast():
            clean = None if batch is None else self._clean(batch, [problem.groups[number] for number in chosen])
        self.optimizer.zero_grad()
        steps = []
        for number in chosen:
            group, objective = self._staged(problem.groups[number]), problem.objectives[number]
            with contextlib.ExitStack() as held:
                with self.fabric.autocast():
                    pooled = self._masked(clean, group, generator(problem.seed, SAMPLE, step, number), held)
                    loss = objective(pooled.samples, pooled.divergence, pooled.penalty)
                if loss.requires_grad:
                    self.fabric.backward(loss)
            self._check_loss(loss, group)
            steps.append((group, objective, pooled))
        weights = _unique([w for group, *_ in steps for module in group.modules for w in module.parameters()])
        self.ranks.add_gradients(weights)
        self._check_gradients(weights, [group for group, *_ in steps])
        for settings, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            settings["lr"] = rate * problem.recipe.rate(step, self.total)
        optimizer.step()
        for group, objective, pooled in steps:
            self._note(group, objective, pooled)
            objective.ascend(pooled.divergence.detach())

    def _joined(self) -> int:
        """Return how many groups take part in this step; groups that share modules join one after another."""
        count, over = len(self.problem.groups), self.problem.recipe.layer_warmup * self.total
        if len(self.checkpoints) == count or self.done >= over:
            return count
        return min(count, 1 + int(count * self.done / over))

    def _staged(self, group: MaskingGroup) -> MaskingGroup:
        """Return the part of a group that takes part in this step."""
        over = self.problem.recipe.layer_warmup * self.total
        return group.last_depths(self.done / over) if self.done < over else group

    def _masked(
        self, clean: Clean | None, group: MaskingGroup, source: torch.Generator, held: contextlib.ExitStack
    ) -> Pooled:
        """Run a masked pass of the global batch, of which this rank computes its own examples."""
        if self.ranks.world_size == 1:
            assert clean is not None
            return self._own(clean, group, source, held)
        shared = group.with_gates([self._share(clean, one).drawing(one.gate) for one in group.maskings])
        try:
            own = None if clean is None else self._own(clean, shared, source, held)
        except NonFiniteError:
            own = self.ranks.not_a_number()  # all ranks must end together
        return self.ranks.pool(own)

    def _share(self, clean: Clean | None, masking: Masking) -> Shard:
        """Return which gates of the global batch belong to this rank."""
        pattern = masking.pattern
        own = None if clean is None else pattern.mask_shape(clean.values[masking.site])
        return self.ranks.shard(self.ranks.shapes(own, len(pattern.gated)))

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
        hooked, every = self.problem.hooked, self.problem.groups
        if self.cache is None:
            return clean_pass(hooked, batch, reads_of(chosen), sites_of(chosen), self.replay)
        assert isinstance(batch, Numbered)

        def compute() -> Clean:
            return clean_pass(hooked, batch.batch, reads_of(every), sites_of(every), self.replay)

        return self.cache.clean(hooked, batch, compute, reads_of(chosen), sites_of(chosen))

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
        groups = self.problem.groups
        with self.fabric.autocast():
            found = self.evaluation.rows(
                (number, move(batch, self.ranks.device)) for number, batch in batches.first_epoch()
            )
        rows = {id(group): {"step": self.done, **row} for group, row in zip(groups, found, strict=True)}
        for row in rows.values():
            self.result.validation.append(row)
            self.log.write("validation", row)
        better = [c.compare(self.done, [rows[id(group)] for group in c.groups]) for c in self.checkpoints]
        self.stale = 0 if any(better) else self.stale + 1
        patience = self.problem.recipe.patience
        if patience is not None and self.stale >= patience:
            self.result.stop_reason = f"no better checkpoint in {patience} validations"

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
