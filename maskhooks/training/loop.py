"""The loop of a training run: what is done in each step, on each of its ranks.

Steps are counted here, and all randomness comes from generators of (seed, purpose, step). The user's model is no part
of what is trained: it is frozen, and placed by us.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.ranks import Pooled, Ranks, Share
from maskhooks.errors import NonFiniteError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.masking import Masking, Masks, needs
from maskhooks.model.outputs import agreement
from maskhooks.model.task import move
from maskhooks.passes.clean_cache import Numbered, Store
from maskhooks.passes.forward import Clean, clean_pass, masked_pass
from maskhooks.runs.run_log import RunLog
from maskhooks.seeds import generator, seeded
from maskhooks.training.checkpoint import Checkpoint, Fitted, grouped
from maskhooks.training.evaluation import Evaluation
from maskhooks.training.objectives import Objective
from maskhooks.training.problem import Problem

SAMPLE, CHOOSE, VALIDATE, EPOCH, BASELINE, MODEL = range(6)  # the purposes of random numbers


class Loop:
    """Draws maskings a step, trains them, and compares checkpoints.

    Args:
        problem: what is trained; its parts are started before the first step.
        fabric: Lightning's, launched.
        ranks: this process among others.
        log: where rows go, beside `result`.
        total: steps in all.
        validation: batches on which checkpoints are compared, in the same order each time.
        store: keeps clean passes across epochs.
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
        store: Store | None = None,
    ) -> None:
        self.problem, self.fabric, self.ranks, self.log = problem, fabric, ranks, log
        self.total, self.validation, self.store = total, validation, store
        self.interval = max(1, total // problem.recipe.validations)
        self.replay = Replay(problem.hooked.model) if problem.recipe.replay else None
        self.evaluation = Evaluation(
            problem.hooked,
            problem.maskings,
            problem.divergence,
            self._drawn,
            replay=self.replay,
            ranks=ranks,
            passes=self.interval * problem.recipe.per_step,  # several draws take no more than the steps in between
        )
        self.checkpoints = [Checkpoint(group, problem.margin) for group in grouped(problem.maskings)]
        self.result = Fitted()
        self.done = self.stale = self.epoch = self.index = 0  # steps made; where the next batch is
        self.batch: Any = None  # the one before it

    def start(self) -> None:
        """Makes the optimizer, once the parts are started."""
        parts = [part for masking in self.problem.maskings for part in masking.parts]
        baselines = [w for part in parts for w in part.baseline.parameters()]
        probes = [w for part in parts for vote in part.votes for w in vote.probe.parameters()]
        self.optimizer = self.problem.recipe.make_optimizer(_unique(probes), _unique(baselines))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, train: Epochs) -> Iterator[None]:
        """Steps on from where it stands, one at a time, until `result.stopped` says why it ended.

        Raises:
            NonFiniteError: something was not finite; the parts hold the state before that step.
        """
        if self.result.stopped:
            return
        optimizer = self.fabric.setup_optimizers(self.optimizer)
        for epoch, index, batch in train.stream(self.epoch, self.index):
            self.epoch, self.index, self.batch = epoch, index, batch
            torch.manual_seed(seeded(self.problem.seed, MODEL, self.done))
            self._step(move(batch, self.ranks.device), optimizer)
            self.done, self.index = self.done + 1, self.index + 1
            if self.validation is not None and (self.done % self.interval == 0 or self.done == self.total):
                self._validate(self.validation)
            if self.done >= self.total and not self.result.stopped:
                self.result.stopped = f"all {self.total} steps were made"
            yield
            if self.result.stopped:
                return

    def _step(self, batch: Any, optimizer: Any) -> None:
        problem, step = self.problem, self.done
        order = torch.randperm(self._joined(), generator=generator(problem.seed, CHOOSE, step))
        chosen = order[: problem.recipe.per_step].tolist()
        with self.fabric.autocast():
            clean = None if batch is None else self._clean(batch, [problem.maskings[number] for number in chosen])
        self.optimizer.zero_grad()
        steps = []
        for number in chosen:
            masking, objective = self._staged(problem.maskings[number]), problem.objectives[number]
            with contextlib.ExitStack() as held:
                with self.fabric.autocast():
                    pooled = self._masked(clean, masking, generator(problem.seed, SAMPLE, step, number), held)
                    loss = objective(pooled.masked, pooled.divergence, pooled.penalty)
                if loss.requires_grad:
                    self.fabric.backward(loss)
            self._check_loss(loss, masking)
            steps.append((masking, objective, pooled))
        weights = _unique([w for masking, *_ in steps for part in masking.modules for w in part.parameters()])
        self.ranks.add_gradients(weights)
        self._check_gradients(weights, [masking for masking, *_ in steps])
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * problem.recipe.rate(step, self.total)
        optimizer.step()
        for masking, objective, pooled in steps:
            self._note(masking, objective, pooled)
            objective.ascend(pooled.divergence.detach())

    def _joined(self) -> int:
        """How many of the maskings take part; those that share parts join one after another."""
        count, over = len(self.problem.maskings), self.problem.recipe.stagger * self.total
        if len(self.checkpoints) == count or self.done >= over:
            return count
        return min(count, 1 + int(count * self.done / over))

    def _staged(self, masking: Masks) -> Masks:
        """What of several maskings at once takes part now."""
        over = self.problem.recipe.stagger * self.total
        return masking.staged(self.done / over) if self.done < over else masking

    def _masked(
        self, clean: Clean | None, masking: Masks, source: torch.Generator, held: contextlib.ExitStack
    ) -> Pooled:
        """A masked pass of the global batch; this rank computes its own examples."""
        if self.ranks.world == 1:
            assert clean is not None
            return self._own(clean, masking, source, held)
        drawing = masking.drawing([self._share(clean, part).drawing(part.gate) for part in masking.parts])
        try:
            own = None if clean is None else self._own(clean, drawing, source, held)
        except NonFiniteError:
            own = self.ranks.not_a_number()  # so that all ranks end together
        return self.ranks.pool(own, masking.parts[0].baseline())

    def _share(self, clean: Clean | None, part: Masking) -> Share:
        """Which gates of the global batch are this rank's."""
        pattern = part.site.gating()
        own = None if clean is None else pattern.mask_shape(clean.values[str(part.site)])
        return self.ranks.share(self.ranks.shapes(own, len(pattern.gated)))

    def _own(self, clean: Clean, masking: Masks, source: torch.Generator, held: contextlib.ExitStack) -> Pooled:
        try:
            masked, outputs = masked_pass(self.problem.hooked, clean, masking, source, held=held)
        except NonFiniteError as error:
            raise self._not_finite("the masked output", masking) from error
        divergence = self.problem.divergence(clean.outputs, outputs)
        penalty = self.problem.penalty(clean.outputs, outputs, divergence)
        return Pooled(masked, divergence, penalty, agreement(clean.outputs, outputs))

    def _clean(self, batch: Any, chosen: Sequence[Masks]) -> Clean:
        """A batch's clean pass, which reads what maskings need and records what their masked passes skip."""
        hooked = self.problem.hooked
        if self.store is None:
            return clean_pass(hooked, batch, *needs(chosen), self.replay)
        assert isinstance(batch, Numbered)

        def compute() -> Clean:
            return clean_pass(hooked, batch.batch, *needs(self.problem.maskings), self.replay)

        return self.store.clean(hooked, batch, compute, *needs(chosen))

    def _check_loss(self, loss: Tensor, masking: Masks) -> None:
        if not torch.isfinite(loss):
            raise self._not_finite("the loss", masking)

    def _check_gradients(self, weights: list[nn.Parameter], maskings: Sequence[Masks]) -> None:
        if getattr(self.fabric.strategy.precision, "scaler", None) is not None:
            return  # in float16 gradients overflow now and then; the scaler skips such a step
        bad = {id(w) for w in weights if w.grad is not None and not bool(torch.isfinite(w.grad).all())}
        if bad:
            own = [m for m in maskings if any(id(w) in bad for part in m.modules for w in part.parameters())]
            raise self._not_finite("a gradient", own[0])

    def _not_finite(self, what: str, masking: Masks) -> NonFiniteError:
        return NonFiniteError(
            f"{what} is not finite at step {self.done} on {masking}. The last good state was kept, and the explainer "
            f"can be used as it is. Look at the model's outputs on this batch, lower the learning rate, or mask other "
            f"sites.",
            site=masking.parts[0].site,
        )

    @torch.no_grad()
    def _note(self, masking: Masks, objective: Objective, pooled: Pooled) -> None:
        row = {
            "step": self.done,
            "epoch": self.epoch,
            "site": masking.label,
            "depth": masking.depth,
            "multiplier": objective.multiplier.item(),
            "divergence": pooled.divergence.mean().item(),
            "expected_l0": pooled.masked.expected_l0.mean().item(),
            "agreement": pooled.agreement.mean().item(),
        }
        self.result.log.append(row)
        self.log.write("log", row)

    @torch.no_grad()
    def _validate(self, batches: Epochs) -> None:
        maskings = self.problem.maskings
        with self.fabric.autocast():
            found = self.evaluation.rows((number, move(batch, self.ranks.device)) for number, batch in batches.once())
        rows = {id(masking): {"step": self.done, **row} for masking, row in zip(maskings, found, strict=True)}
        for row in rows.values():
            self.result.validation.append(row)
            self.log.write("validation", row)
        better = [c.compare(self.done, [rows[id(masking)] for masking in c.maskings]) for c in self.checkpoints]
        self.stale = 0 if any(better) else self.stale + 1
        patience = self.problem.recipe.patience
        if patience is not None and self.stale >= patience:
            self.result.stopped = f"no better checkpoint in {patience} validations"

    def _drawn(self, number: int, *others: int) -> torch.Generator:
        """Of the samples for a validation batch; the same for all checkpoints."""
        return generator(seeded(self.problem.seed, VALIDATE, number), *others)

    def finish(self) -> list[str]:
        """Puts the chosen states back; names those that do not keep within the margin."""
        if not self.result.validation:
            return []
        for checkpoint in self.checkpoints:
            checkpoint.restore()
            self.result.chosen.update({str(masking): checkpoint.step or 0 for masking in checkpoint.maskings})
        far = [str(checkpoint) for checkpoint in self.checkpoints if not checkpoint.within]
        self.result.within_margin = not far
        return far


def _unique(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
