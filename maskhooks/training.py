"""Training: Lightning's loop around `step.py`.

The user's model is no part of the LightningModule: it is placed on the device, and put back, by us. Steps are counted
by us, and all randomness comes from generators of (seed, purpose, step).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from maskhooks.checkpoint import Fitted
from maskhooks.errors import EmptyLoaderError, SettingError
from maskhooks.loop import BASELINE, EPOCH, Loop
from maskhooks.placement import placed
from maskhooks.preparation import fit_baselines, gather
from maskhooks.problem import Problem
from maskhooks.replay import Replay
from maskhooks.runlog import RunLog
from maskhooks.seeds import forked, seeded
from maskhooks.stepbar import StepBar
from maskhooks.store import Store, Stored
from maskhooks.tap import frozen
from maskhooks.task import device_of


def fit(
    problem: Problem,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    steps: int,
    run_dir: Path | None = None,
    progress: bool = True,
    store: Store | None = None,
    **trainer: Any,
) -> Fitted:
    """Trains the maskings; their modules hold the chosen state afterwards, and the model is as it was.

    Args:
        train: batches; gone through as often as `steps` needs.
        validation: batches on which checkpoints are compared; without them the last state is kept.
        steps: training steps in all.
        run_dir: where `log.csv` and `validation.csv` are written while training goes on.
        progress: whether a progress bar is shown on stderr.
        store: keeps clean passes across epochs; the batches of the first epoch come again in the later ones.
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
        torch.manual_seed(seeded(problem.seed, EPOCH))
        check_loaders(train, validation)
        logs = stack.enter_context(RunLog(run_dir))
        loop = Loop(problem, steps, logs, store)
        interval = max(1, steps // problem.recipe.validations)
        runner = pl.Trainer(
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[StepBar()] if progress else [],
            num_sanity_val_steps=0,
            val_check_interval=interval if validation is not None else None,
            check_val_every_n_epoch=None if validation is not None else 1,
            **trainer,
        )
        stack.enter_context(placed(problem.hooked.model, runner.strategy.root_device))
        loop.prepare(train, runner.strategy.root_device, progress)
        batches = train
        if store is not None:
            batches = Stored(train, problem.seed, store)
            stack.callback(store.clear)
        runner.fit(loop, _loader(batches), _loader(validation) if validation is not None else None)
    return loop.finish()


class _Batches:
    """Any iterable of batches as one loader; Lightning takes a list for a list of loaders."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _loader(batches: Iterable[Any]) -> Any:
    return batches if isinstance(batches, DataLoader) else _Batches(batches)


def fit_baselines_only(problem: Problem, train: Iterable[Any], replay: Replay | None, *, progress: bool = True) -> None:
    """For free logits: statistics and baselines are learned from data, the logits are not."""
    device = device_of(problem.hooked.model)
    with frozen(problem.hooked.model), forked(problem.hooked.model):
        torch.manual_seed(seeded(problem.seed, EPOCH))
        gather(problem.hooked, problem.maskings, itertools.islice(train, problem.recipe.statistics), device)
        fit_baselines(
            problem.hooked,
            problem.fit_first,
            train,
            problem.divergence,
            steps=problem.recipe.baseline_steps,
            seed=seeded(problem.seed, BASELINE),
            device=device,
            replay=replay,
            progress=progress,
        )


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
