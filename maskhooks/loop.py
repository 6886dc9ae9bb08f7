"""The loop of a training run, a LightningModule: it holds the masks' parts, and not the user's model.

Steps are counted by us, and all randomness comes from generators of (seed, purpose, step).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sized
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from maskhooks.checkpoint import Checkpoint, Fitted, Measure, grouped
from maskhooks.errors import MarginWarning, NonFiniteError
from maskhooks.masking import Masking
from maskhooks.objectives import Objective
from maskhooks.outputs import agreement
from maskhooks.preparation import closed_divergences, fit_baselines, gather
from maskhooks.problem import Problem, evaluate_batch
from maskhooks.progress import track
from maskhooks.replay import Replay
from maskhooks.runlog import RunLog
from maskhooks.seeds import generator, seeded
from maskhooks.step import Clean, clean_pass, masked_pass
from maskhooks.store import Numbered, Store

SAMPLE, CHOOSE, VALIDATE, EPOCH, BASELINE = range(5)  # the purposes of random numbers


class Loop(pl.LightningModule):
    """Draws a masking a step, trains it, compares checkpoints; holds the masks' parts and not the user's model."""

    def __init__(self, problem: Problem, steps: int, logs: RunLog, store: Store | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.problem, self.total, self.logs, self.store = problem, steps, logs, store
        self.replay = Replay(problem.hooked.model) if problem.recipe.replay else None
        self.checkpoints = [Checkpoint(group, problem.margin) for group in grouped(problem.maskings)]
        self.result = Fitted()
        self.done = self.stale = 0

    def prepare(self, train: Iterable[Any], device: torch.device, progress: bool) -> None:
        """Starts and fits the parts, and starts the objectives with the divergence of the fully masked model."""
        problem = self.problem
        hooked, recipe = problem.hooked, problem.recipe
        read = itertools.islice(train, recipe.statistics)
        known = min(len(train), recipe.statistics) if isinstance(train, Sized) else None
        gather(hooked, problem.maskings, track(read, "reading values", total=known, shown=progress), device)
        fit_baselines(
            hooked,
            problem.fit_first,
            train,
            problem.divergence,
            steps=recipe.baseline_steps,
            device=device,
            seed=seeded(problem.seed, BASELINE),
            replay=self.replay,
            progress=progress,
        )
        closed = closed_divergences(
            hooked,
            problem.maskings,
            itertools.islice(train, min(4, recipe.statistics)),
            problem.divergence,
            device,
            self.replay,
        )
        for objective, divergence in zip(problem.objectives, closed, strict=True):
            objective.to(device)
            objective.start(divergence.mean())
        self.parts = nn.ModuleList(problem.parts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        baselines = [w for m in self.problem.maskings for w in m.baseline.parameters()]
        probes = [w for m in self.problem.maskings for vote in m.votes for w in vote.probe.parameters()]
        optimizer = self.problem.recipe.make_optimizer(_unique(probes), _unique(baselines))
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(seeded(self.problem.seed, EPOCH, self.current_epoch))

    def training_step(self, batch: Any, index: int) -> None:
        problem, step = self.problem, self.done
        source = generator(problem.seed, CHOOSE, step)
        number = int(torch.randint(len(problem.maskings), (), generator=source))
        masking, objective = problem.maskings[number], problem.objectives[number]
        clean = self._clean(batch, masking)
        try:
            masked, outputs = masked_pass(problem.hooked, clean, masking, generator(problem.seed, SAMPLE, step))
        except NonFiniteError as error:
            raise self._not_finite("the masked output", masking) from error
        divergence = problem.divergence(clean.outputs, outputs)
        loss = objective(masked, divergence)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        if loss.requires_grad:
            self.manual_backward(loss)
        self._check_finite(loss, masking)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * problem.recipe.rate(step, self.total)
        optimizer.step()
        everyone = divergence.detach()
        if self.trainer.world_size > 1:
            gathered = self.all_gather(everyone)
            assert isinstance(gathered, Tensor)
            everyone = gathered.flatten()
        self._note(masking, objective, everyone, masked.expected_l0, agreement(clean.outputs, outputs))
        objective.ascend(everyone)
        self.done += 1
        if self.done >= self.total:
            self._stop(f"all {self.total} steps were made")

    def _clean(self, batch: Any, masking: Masking) -> Clean:
        """A batch's clean pass, which reads what a masking needs and records what its masked pass skips."""
        hooked, maskings = self.problem.hooked, self.problem.maskings
        if self.store is None:
            return clean_pass(hooked, batch, masking.reads, [masking.site], self.replay)
        assert isinstance(batch, Numbered)
        reads = list(dict.fromkeys(site for one in maskings for site in one.reads))
        onward = list(dict.fromkeys(one.site for one in maskings))

        def compute() -> Clean:
            return clean_pass(hooked, batch.batch, reads, onward, self.replay)

        return self.store.clean(hooked, batch, compute, masking.reads, [masking.site])

    def _check_finite(self, loss: Tensor, masking: Masking) -> None:
        grads = [weight.grad for part in masking.modules for weight in part.parameters() if weight.grad is not None]
        what = "the loss" if not torch.isfinite(loss) else "a gradient"
        if what == "a gradient" and all(bool(torch.isfinite(grad).all()) for grad in grads):
            return
        raise self._not_finite(what, masking)

    def _not_finite(self, what: str, masking: Masking) -> NonFiniteError:
        return NonFiniteError(
            f"{what} is not finite at step {self.done} on {masking}. The last good state was kept, and the explainer "
            f"can be used as it is. Look at the model's outputs on this batch, lower the learning rate, or mask other "
            f"sites.",
            site=masking.site,
        )

    @torch.no_grad()
    def _note(self, masking: Masking, objective: Objective, divergence: Tensor, l0: Tensor, agree: Tensor) -> None:
        row = {
            "step": self.done,
            "epoch": self.current_epoch,
            "site": str(masking.site),
            "depth": masking.depth,
            "multiplier": objective.multiplier.item(),
            "divergence": divergence.mean().item(),
            "expected_l0": l0.mean().item(),
            "agreement": agree.mean().item(),
        }
        self.result.log.append(row)
        self.logs.write("log", row)

    def _stop(self, reason: str) -> None:
        self.trainer.should_stop = True
        self.result.stopped = self.result.stopped or reason

    def on_validation_epoch_start(self) -> None:
        self.measures = [Measure(masking) for masking in self.problem.maskings]

    def validation_step(self, batch: Any, index: int) -> None:
        evaluate_batch(self.problem, batch, self.measures, self.replay, seeded(self.problem.seed, VALIDATE, index))

    def on_validation_epoch_end(self) -> None:
        if self.result.validation and self.result.validation[-1]["step"] == self.done:
            return  # nothing was learned since
        rows = {id(measure.masking): {"step": self.done, **measure.row()} for measure in self.measures}
        for row in rows.values():
            self.result.validation.append(row)
            self.logs.write("validation", row)
        better = [c.compare(self.done, [rows[id(masking)] for masking in c.maskings]) for c in self.checkpoints]
        self.stale = 0 if any(better) else self.stale + 1
        patience = self.problem.recipe.patience
        if patience is not None and self.stale >= patience:
            self._stop(f"no better checkpoint in {patience} validations")

    def finish(self) -> Fitted:
        """Puts the chosen states back."""
        if not self.result.validation:
            return self.result
        for checkpoint in self.checkpoints:
            checkpoint.restore()
            self.result.chosen.update({str(masking): checkpoint.step or 0 for masking in checkpoint.maskings})
        far = [str(checkpoint) for checkpoint in self.checkpoints if not checkpoint.within]
        self.result.within_margin = not far
        if far:
            warnings.warn(
                f"no checkpoint kept the mean divergence within the margin of {self.problem.margin} nats for "
                f"{'; '.join(far)}. The nearest was chosen. Train for more steps, or allow a larger margin.",
                MarginWarning,
                stacklevel=4,
            )
        return self.result


def _unique(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
