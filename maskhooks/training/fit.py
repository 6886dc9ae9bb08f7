"""Fitting: start or resume a run, on one device or in several processes."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.devices import make_fabric, starts_processes
from maskhooks.distributed.ranks import Ranks
from maskhooks.errors import EmptyLoaderError, MarginWarning
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.preserved import preserved
from maskhooks.hooks.replay import Replay
from maskhooks.model.task import device_of
from maskhooks.seeds import seeded
from maskhooks.training.one_process import run_here
from maskhooks.training.preparation import gather_and_fit_baselines
from maskhooks.training.problem import EPOCH, Problem
from maskhooks.training.processes import run_in_processes
from maskhooks.training.run import FitResult, Run


def fit(run: Run, **devices: Any) -> FitResult:
    """Train the maskings. Afterwards their modules hold the chosen state, and the model is unchanged.

    Args:
        devices: settings of Lightning's Fabric, such as accelerator="gpu".

    Returns:
        The result of the run. If something ended the run early, the caller must raise its `cause`.

    Raises:
        EmptyLoaderError: a loader yields no batch.
        SettingError: a device setting cannot be used.
        ResumeError: the folder holds a run with other settings.
        CorruptFileError: the saved state is broken.
    """
    problem = run.problem
    with _quiet():
        fabric = make_fabric(**devices)
        if starts_processes(fabric):
            result = run_in_processes(fabric, run)
        else:
            fabric.launch()
            result = run_here(fabric, run)
    if result.over_margin:
        longer = "Train for more steps" if run.budget is None else "Give a longer budget"
        warnings.warn(
            f"no checkpoint kept the mean divergence within the margin of {problem.margin} nats for "
            f"{'; '.join(result.over_margin)}. The closest was chosen. {longer}, or allow a larger margin.",
            MarginWarning,
            stacklevel=3,
        )
    for module in problem.modules:
        module.to(device_of(problem.hooked.model))
    return result


def fit_baselines_only(problem: Problem, train: Iterable[Any], replay: Replay | None, *, progress: bool = True) -> None:
    """Gather statistics and fit baselines, for per-example logits, which learn nothing else from data."""
    ranks = Ranks(device=device_of(problem.hooked.model))
    batches = Epochs(train, seeded(problem.seed, EPOCH))
    with frozen(problem.hooked.model), preserved(problem.hooked.model), batches.seeded():
        gather_and_fit_baselines(problem, batches, replay, ranks, progress)


def check_loaders(train: Iterable[Any], validation: Iterable[Any] | None) -> None:
    """Raise EmptyLoaderError for a loader that yields nothing or can be read only once."""
    for name, loader in {"training": train, "validation": validation}.items():
        if loader is not None and (iter(loader) is loader or next(iter(loader), None) is None):
            what = "can be read only once" if iter(loader) is loader else "yields no batch"
            raise EmptyLoaderError(f"the {name} loader {what}. Give a DataLoader or a list of batches.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes on devices and precision, which do not concern masks."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
