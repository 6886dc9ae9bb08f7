"""Training: Lightning's loop around `step.py`.

The user's model is no part of the LightningModule: it is placed on the device, and put back, by us. Steps are counted
by us, and all randomness comes from generators of (seed, purpose, step).
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskhooks.checkpoint import Checkpoint, Fitted, Measure, grouped
from maskhooks.errors import EmptyLoaderError, MarginWarning, NonFiniteError, SettingError
from maskhooks.hooked import Hooked
from maskhooks.masking import Masking
from maskhooks.objectives import Objective
from maskhooks.outputs import Divergence, agreement
from maskhooks.preparation import closed_divergences, fit_baselines, gather
from maskhooks.progress import bar, track
from maskhooks.recipe import Recipe
from maskhooks.replay import Replay
from maskhooks.seeds import forked, generator, seeded
from maskhooks.step import clean_pass, masked_pass
from maskhooks.tap import frozen
from maskhooks.task import device_of

_SAMPLE, _CHOOSE, _VALIDATE, _EPOCH, _BASELINE = range(5)


@dataclass
class Problem:
    """What is trained: maskings of one model's sites, an objective each."""

    hooked: Hooked
    maskings: Sequence[Masking]
    objectives: Sequence[Objective]
    recipe: Recipe
    divergence: Divergence
    margin: float
    seed: int
    fit_first: Sequence[Masking] = ()  # maskings whose learned baseline is fitted before any gate, and then kept

    @property
    def parts(self) -> list[nn.Module]:
        """Every trained module once."""
        return list({id(part): part for masking in self.maskings for part in masking.modules}.values())


def fit(
    problem: Problem,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    steps: int,
    run_dir: Path | None = None,
    progress: bool = True,
    **trainer: Any,
) -> Fitted:
    """Trains the maskings; their modules hold the chosen state afterwards, and the model is as it was.

    Args:
        train: batches; gone through as often as `steps` needs.
        validation: batches on which checkpoints are compared; without them the last state is kept.
        steps: training steps in all.
        run_dir: where `log.csv` and `validation.csv` are written while training goes on.
        progress: whether a progress bar is shown on stderr.
        trainer: settings of Lightning's Trainer, such as accelerator="gpu".

    Raises:
        EmptyLoaderError: a loader yields no batch.
        NonFiniteError: a loss or gradient was not finite; the maskings hold the last good state.
        SettingError: a precision that would rewrite the model's weights.
    """
    if str(trainer.get("precision", "")).endswith("-true"):
        raise SettingError(
            f"precision={trainer['precision']!r} would rewrite the model's weights. Use '16-mixed' or 'bf16-mixed', or "
            f"load the model in that dtype."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(frozen(problem.hooked.model))
        stack.enter_context(forked(problem.hooked.model))
        torch.manual_seed(seeded(problem.seed, _EPOCH))
        check_loaders(train, validation)
        writers = stack.enter_context(_writers(run_dir))
        loop = _Loop(problem, steps, writers)
        interval = max(1, steps // problem.recipe.validations)
        runner = pl.Trainer(
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[_Bar()] if progress else [],
            num_sanity_val_steps=0,
            val_check_interval=interval if validation is not None else None,
            check_val_every_n_epoch=None if validation is not None else 1,
            **trainer,
        )
        stack.enter_context(_placed(problem.hooked.model, runner.strategy.root_device))
        loop.prepare(train, runner.strategy.root_device, progress)
        runner.fit(loop, _loader(train), _loader(validation) if validation is not None else None)
    return loop.finish()


class _Batches:
    """Any iterable of batches as one loader; Lightning takes a list for a list of loaders."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _loader(batches: Iterable[Any]) -> Any:
    return batches if isinstance(batches, DataLoader) else _Batches(batches)


class _Loop(pl.LightningModule):
    """Draws a masking a step, trains it, compares checkpoints; holds the masks' parts and not the user's model."""

    def __init__(self, problem: Problem, steps: int, writers: _Writers) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.problem, self.total, self.writers = problem, steps, writers
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
            seed=seeded(problem.seed, _BASELINE),
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
        torch.manual_seed(seeded(self.problem.seed, _EPOCH, self.current_epoch))

    def training_step(self, batch: Any, index: int) -> None:
        problem, step = self.problem, self.done
        source = generator(problem.seed, _CHOOSE, step)
        number = int(torch.randint(len(problem.maskings), (), generator=source))
        masking, objective = problem.maskings[number], problem.objectives[number]
        clean = clean_pass(problem.hooked, batch, masking.reads, [masking.site], self.replay)
        try:
            masked, outputs = masked_pass(problem.hooked, clean, masking, generator(problem.seed, _SAMPLE, step))
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
        self.writers.write("log", row)

    def _stop(self, reason: str) -> None:
        self.trainer.should_stop = True
        self.result.stopped = self.result.stopped or reason

    def on_validation_epoch_start(self) -> None:
        self.measures = [Measure(masking) for masking in self.problem.maskings]

    def validation_step(self, batch: Any, index: int) -> None:
        evaluate_batch(self.problem, batch, self.measures, self.replay, seeded(self.problem.seed, _VALIDATE, index))

    def on_validation_epoch_end(self) -> None:
        if self.result.validation and self.result.validation[-1]["step"] == self.done:
            return  # nothing was learned since
        rows = {id(measure.masking): {"step": self.done, **measure.row()} for measure in self.measures}
        for row in rows.values():
            self.result.validation.append(row)
            self.writers.write("validation", row)
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


def fit_baselines_only(problem: Problem, train: Iterable[Any], replay: Replay | None, *, progress: bool = True) -> None:
    """For free logits: statistics and baselines are learned from data, the logits are not."""
    device = device_of(problem.hooked.model)
    with frozen(problem.hooked.model), forked(problem.hooked.model):
        torch.manual_seed(seeded(problem.seed, _EPOCH))
        gather(problem.hooked, problem.maskings, itertools.islice(train, problem.recipe.statistics), device)
        fit_baselines(
            problem.hooked,
            problem.fit_first,
            train,
            problem.divergence,
            steps=problem.recipe.baseline_steps,
            seed=seeded(problem.seed, _BASELINE),
            device=device,
            replay=replay,
            progress=progress,
        )


def evaluate_batch(problem: Problem, batch: Any, measures: Sequence[Measure], replay: Replay | None, seed: int) -> None:
    """Adds a batch to measures: one clean pass, and a masked pass from each masked site onward."""
    reads = list(dict.fromkeys(site for measure in measures for site in measure.masking.reads))
    onward = list(dict.fromkeys(measure.masking.site for measure in measures))
    clean = clean_pass(problem.hooked, batch, reads, onward, replay)
    for number, measure in enumerate(measures):
        measure.add(problem.hooked, clean, problem.divergence, generator(seed, number))


class _Bar(pl.Callback):
    """A progress bar of our own steps, with the latest divergence and fraction kept."""

    def on_train_start(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        assert isinstance(loop, _Loop)
        self.bar, self.task = bar("training", loop.total)
        self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, loop: pl.LightningModule, *_: Any) -> None:
        assert isinstance(loop, _Loop)
        latest = loop.result.log[-50:]
        divergence, kept = (sum(row[key] for row in latest) / len(latest) for key in ("divergence", "expected_l0"))
        self.bar.update(self.task, completed=loop.done, description=f"divergence {divergence:.3f} kept {kept:.2f}")

    def on_train_end(self, trainer: pl.Trainer, loop: pl.LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: pl.Trainer, loop: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


class _Writers:
    """CSV files of a run, a row at a time."""

    def __init__(self, folder: Path | None, stack: contextlib.ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.open: dict[str, csv.DictWriter[str]] = {}

    def write(self, name: str, row: dict[str, Any]) -> None:
        if self.folder is None:
            return
        if name not in self.open:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.stack.enter_context((self.folder / f"{name}.csv").open("w", newline="", buffering=1))
            self.open[name] = csv.DictWriter(file, list(row))
            self.open[name].writeheader()
        self.open[name].writerow(row)


@contextlib.contextmanager
def _writers(folder: Path | None) -> Iterator[_Writers]:
    with contextlib.ExitStack() as stack:
        yield _Writers(folder, stack)


@contextlib.contextmanager
def _placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device, and back where it was; a model spread over several devices stays as it is."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) != 1 or devices == {device}:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(devices.pop())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its hints on workers and devices, which do not concern masks."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for hint in ("does not have many workers", "have no `val_dataloader`", "has shuffling enabled", "LeafSpec"):
                warnings.filterwarnings("ignore", message=f".*{hint}.*")
            yield
    finally:
        logger.setLevel(level)


def check_loaders(train: Iterable[Any], validation: Iterable[Any] | None) -> None:
    """Raises EmptyLoaderError for a loader that yields nothing, or only once."""
    for name, loader in {"training": train, "validation": validation}.items():
        if loader is not None and (iter(loader) is loader or next(iter(loader), None) is None):
            what = "can be read just once" if iter(loader) is loader else "yields no batch"
            raise EmptyLoaderError(f"the {name} loader {what}. Give a DataLoader or a list of batches.")


def _unique(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
