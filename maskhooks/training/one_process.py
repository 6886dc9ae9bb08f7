"""One process's part of a training run: start or resume the loop, and run it to its end."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from typing import Any

from lightning.fabric import Fabric

from maskhooks.data.epochs import Epochs
from maskhooks.distributed.devices import ranks_of
from maskhooks.distributed.placement import on_device
from maskhooks.errors import NonFiniteError, ResumeWarning, SettingError, StorageError
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.preserved import preserved
from maskhooks.passes.clean_cache import Stored
from maskhooks.progress import length, say
from maskhooks.runs.interrupts import Interrupts
from maskhooks.runs.run_log import RunLog
from maskhooks.runs.run_state import decode, encode
from maskhooks.seeds import seeded
from maskhooks.training.loop import Loop
from maskhooks.training.pace import Pace
from maskhooks.training.preparation import prepare
from maskhooks.training.problem import EPOCH, VALIDATE
from maskhooks.training.run import FitResult, Run
from maskhooks.training.snapshot import Snapshots, check_batch, restore, snapshot
from maskhooks.training.step_bar import StepBar


def run_here(fabric: Fabric, run: Run) -> FitResult:
    """Train in this process, which may be one of several; afterwards the modules hold the chosen states."""
    problem = run.problem
    model, ranks = problem.hooked.model, ranks_of(fabric)
    with contextlib.ExitStack() as stack:
        for context in (frozen(model), on_device(model, ranks.device), preserved(model)):
            stack.enter_context(context)
        log = stack.enter_context(RunLog(run.folder, run.board) if ranks.is_first else RunLog(None))
        batches: Iterable[Any] = run.train
        cache = None if run.cache is None else run.cache.for_rank(ranks.rank, ranks.world_size)
        if cache is not None:
            batches = Stored(run.train, problem.seed, cache)
            stack.callback(cache.clear)
        train = Epochs(batches, seeded(problem.seed, EPOCH), ranks.rank, ranks.world_size)
        stack.enter_context(train.seeded())
        validation = None
        if run.validation is not None:
            validation = Epochs(run.validation, seeded(problem.seed, VALIDATE), ranks.rank, ranks.world_size)
            stack.enter_context(validation.seeded())
        total = 0 if run.budget is not None else run.steps or run.epochs * (train.rounds or 0)
        stored = 0 if cache is None else train.rounds or 0
        checks = problem.recipe.validations if validation is not None else 0
        pace = Pace(
            total,
            run.budget,
            checks,
            len(problem.groups),
            stored,
            together=problem.recipe.together(len(problem.groups)),
            calibrations=problem.recipe.calibrations if checks else 0,
        )
        loop = Loop(problem, fabric, ranks, log, pace=pace, validation=validation, cache=cache)
        snapshots = Snapshots(run.folder if ranks.is_first else None, _about(fabric, run, total), run.save_every)
        _begin(loop, run, train, snapshots)
        loop.result.error = _go(loop, run, train, snapshots)
        return loop.finish()


def _begin(loop: Loop, run: Run, train: Epochs, snapshots: Snapshots) -> None:
    """Restore or start a loop, on all ranks as on the first."""
    tree = snapshots.find() if run.resume else None
    if tree is not None:
        check_batch(tree, train)
        tree["rows"] = loop.log.resume(tree["log"])
    elif loop.ranks.is_first:
        if run.resume:
            warnings.warn(
                f"{run.folder} holds nothing to resume, so training starts from the beginning.",
                ResumeWarning,
                stacklevel=5,
            )
        snapshots.drop()
    if not loop.ranks.broadcast(tree is not None):
        shown = run.progress and loop.ranks.is_first
        prepare(loop.problem, _fresh(run, train), loop.replay, loop.ranks, shown, loop.pace.for_warm_start)
        loop.start()
    if loop.ranks.world_size > 1:
        own = encode(tree or {**snapshot(loop), "rows": {}}) if loop.ranks.is_first else b""
        tree = decode(loop.ranks.broadcast(own))
    if tree is not None:
        restore(loop, tree)
        loop.result.log, loop.result.validation = (tree["rows"].get(name, []) for name in ("log", "validation"))
    if tree is None or not tree["done"]:
        snapshots.save(loop)
    else:
        snapshots.saved(loop)


def _go(loop: Loop, run: Run, train: Epochs, snapshots: Snapshots) -> dict[str, Any] | None:
    """Run the loop to its end; return what ended it early, in the form of `FitResult.error`."""
    shown = run.progress and loop.ranks.is_first
    try:
        if (run.progress or run.budget is not None) and not loop.result.stop_reason:
            _plan(loop, run, train, snapshots, shown)
        with Interrupts() as interrupts, StepBar(loop, shown=shown) as bar:
            for _ in loop.run(train):
                bar.update()
                if number := loop.ranks.largest(interrupts.asked):
                    return _interrupted(loop, run, snapshots, number)
                snapshots.save_if_due(loop)
            snapshots.save(loop)
    except NonFiniteError as error:
        loop.result.stop_reason = f"not finite at step {loop.done}"
        kept = "" if run.folder is None else f" It is saved in {run.folder}."
        return {"kind": "NonFiniteError", "message": f"{error}{kept}", "site": str(error.site)}
    except StorageError as error:
        loop.result.stop_reason = f"nothing could be written at step {loop.done}"
        go_on = f"Training stopped at step {loop.done}; resume continues from the last saved state."
        return {"kind": "StorageError", "message": f"{error} {go_on}", "path": str(error.path)}
    return None


def _plan(loop: Loop, run: Run, train: Epochs, snapshots: Snapshots, shown: bool) -> None:
    """Time two steps, and say how long the rest will take."""
    loop.rehearse(_fresh(run, train))
    if wrong := loop.ranks.broadcast(loop.pace.begin()):
        if not loop.done:
            snapshots.drop()  # with a longer budget, the run begins anew
        raise SettingError(wrong)
    if shown:
        say(loop.pace.plan(len(loop.problem.groups), loop.problem.recipe.name, loop.done))


def _fresh(run: Run, train: Epochs) -> Epochs:
    """Return the same batches for reading ahead: `train` counts epochs from its first batch on."""
    return Epochs(run.train, train.seed, train.rank, train.world_size)


def _interrupted(loop: Loop, run: Run, snapshots: Snapshots, number: int) -> dict[str, Any]:
    snapshots.save(loop)
    total = "" if loop.pace.budget is not None else f" of {loop.pace.total}"
    where = f"at step {loop.done}{total}"
    loop.result.stop_reason = loop.result.stop_reason or f"interrupted at step {loop.done}"
    go_on = "" if run.folder is None else f" It is saved in {run.folder}; resume continues from here."
    return {"signal": number, "message": f"training was interrupted {where}; the explainer can be used.{go_on}"}


def _about(fabric: Fabric, run: Run, total: int) -> dict[str, Any]:
    """Return what a resumed run must have in common with the saved one."""
    loaders: dict[str, Any] = {"training batches": run.train, "validation batches": run.validation}
    sizes = {name: length(loader) for name, loader in loaders.items() if loader is not None}
    ours: dict[str, Any] = {"steps": total, "processes": fabric.world_size, "cache": run.cache is not None}
    if run.budget is not None:
        ours["budget"] = run.budget.seconds
    return {**run.metadata, **sizes, **ours, "precision": fabric.strategy.precision.precision}
