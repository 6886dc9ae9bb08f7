"""Training: one run of the loop, on one device or many, from its start or from where it was left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch.multiprocessing.spawn import ProcessException

from maskhooks import errors
from maskhooks.data.epochs import Epochs
from maskhooks.distributed.devices import connect, ranks_of, starts_processes
from maskhooks.distributed.placement import placed
from maskhooks.distributed.ranks import Ranks
from maskhooks.errors import (
    EmptyLoaderError,
    MarginWarning,
    MaskhooksError,
    NonFiniteError,
    ResumeWarning,
    SettingError,
    StorageError,
)
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.model.task import device_of
from maskhooks.passes.clean_cache import Store, Stored
from maskhooks.progress import track
from maskhooks.runs.interrupts import Interrupts, as_exception
from maskhooks.runs.run_log import RunLog
from maskhooks.runs.run_state import decode, encode
from maskhooks.runs.tensorboard import Board
from maskhooks.seeds import forked, seeded
from maskhooks.training.checkpoint import Fitted
from maskhooks.training.loop import BASELINE, EPOCH, VALIDATE, Loop
from maskhooks.training.preparation import closed_divergences, fit_baselines, gather
from maskhooks.training.problem import Problem
from maskhooks.training.snapshot import Snapshots, check_batch, parts_of, put_parts, restore, snapshot
from maskhooks.training.step_bar import StepBar


@dataclass(frozen=True)
class Run:
    """How a problem is trained, beside the devices.

    Args:
        train: batches; gone through as often as needed.
        validation: batches on which checkpoints are compared; without them the last state is kept.
        steps: training steps in all.
        epochs: instead of steps, how often to go through `train`.
        folder: where `log.csv`, `validation.csv` and the state of the run are written while it goes on.
        resume: whether to go on from the state in the folder.
        save_every: seconds between two states; there is one after each validation too.
        about: what a run must have in common with the one it goes on from, as JSON has it.
        progress: whether a progress bar is shown on stderr.
        store: keeps clean passes across epochs; the batches of the first epoch come again in the later ones.
        board: where the logs are written for TensorBoard.
    """

    train: Iterable[Any]
    validation: Iterable[Any] | None = None
    steps: int = 0
    epochs: int = 0
    folder: Path | None = None
    resume: bool = False
    save_every: float = 60.0
    about: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    store: Store | None = None
    board: Board | None = None


def fit(problem: Problem, run: Run, **devices: Any) -> Fitted:
    """Trains the maskings; their modules hold the chosen state afterwards, and the model is as it was.

    Args:
        devices: settings of Lightning's Fabric, such as accelerator="gpu".

    Returns:
        What the run left. Where something ended it before its time, `cause` is to be raised.

    Raises:
        EmptyLoaderError: a loader yields no batch.
        SettingError: a setting of the devices cannot be used.
        ResumeError: the folder holds a run with other settings.
        CorruptFileError: its state is broken.
    """
    with _quiet():
        fabric = connect(**devices)
        if starts_processes(fabric):
            outcome = _in_processes(fabric, problem, run)
        else:
            fabric.launch()
            outcome = _train(fabric, problem, run)
    result = Fitted(**outcome["result"])
    result.cause = _exception(outcome["cause"])
    if outcome["far"]:
        warnings.warn(
            f"no checkpoint kept the mean divergence within the margin of {problem.margin} nats for "
            f"{'; '.join(outcome['far'])}. The nearest was chosen. Train for more steps, or allow a larger margin.",
            MarginWarning,
            stacklevel=3,
        )
    for part in problem.parts:
        part.to(device_of(problem.hooked.model))
    return result


def fit_baselines_only(problem: Problem, train: Iterable[Any], replay: Replay | None, *, progress: bool = True) -> None:
    """For free logits: statistics and baselines are learned from data, the logits are not."""
    ranks = Ranks(device=device_of(problem.hooked.model))
    batches = Epochs(train, seeded(problem.seed, EPOCH))
    with frozen(problem.hooked.model), forked(problem.hooked.model), batches.drawn():
        _gather(problem, batches, replay, ranks, progress)


def check_loaders(train: Iterable[Any], validation: Iterable[Any] | None) -> None:
    """Raises EmptyLoaderError for a loader that yields nothing, or only once."""
    for name, loader in {"training": train, "validation": validation}.items():
        if loader is not None and (iter(loader) is loader or next(iter(loader), None) is None):
            what = "can be read just once" if iter(loader) is loader else "yields no batch"
            raise EmptyLoaderError(f"the {name} loader {what}. Give a DataLoader or a list of batches.")


def _train(fabric: Fabric, problem: Problem, run: Run) -> dict[str, Any]:
    """One rank's part of a run. Gives its outcome, as JSON has it; the parts hold the chosen states."""
    model, ranks = problem.hooked.model, ranks_of(fabric)
    with contextlib.ExitStack() as stack:
        for context in (frozen(model), placed(model, ranks.device), forked(model)):
            stack.enter_context(context)
        log = stack.enter_context(RunLog(run.folder, run.board) if ranks.first else RunLog(None))
        batches: Iterable[Any] = run.train
        store = None if run.store is None else run.store.for_rank(ranks.number, ranks.world)
        if store is not None:
            batches = Stored(run.train, problem.seed, store)
            stack.callback(store.clear)
        train = Epochs(batches, seeded(problem.seed, EPOCH), ranks.number, ranks.world)
        stack.enter_context(train.drawn())
        held = None
        if run.validation is not None:
            held = Epochs(run.validation, seeded(problem.seed, VALIDATE), ranks.number, ranks.world)
            stack.enter_context(held.drawn())
        total = run.steps or run.epochs * (train.rounds or 0)
        loop = Loop(problem, fabric, ranks, log, total=total, validation=held, store=store)
        snapshots = Snapshots(run.folder if ranks.first else None, _about(fabric, run, total), run.save_every)
        _begin(loop, run, train, snapshots)
        cause = _go(loop, run, train, snapshots)
    return {"far": loop.finish(), "result": _fields(loop.result), "cause": cause}


def _begin(loop: Loop, run: Run, train: Epochs, snapshots: Snapshots) -> None:
    """Puts a loop where it was left, or at its start; all ranks where the first one is."""
    tree = snapshots.find() if run.resume else None
    if tree is not None:
        check_batch(tree, train)
        tree["rows"] = loop.log.go_on(tree["log"])
    elif loop.ranks.first:
        if run.resume:
            warnings.warn(
                f"there is nothing to go on from in {run.folder}: training begins at the start.",
                ResumeWarning,
                stacklevel=5,
            )
        snapshots.drop()
    if not loop.ranks.firsts(tree is not None):
        batches = Epochs(run.train, train.seed, train.rank, train.world)
        prepare(loop.problem, batches, loop.replay, loop.ranks, run.progress and loop.ranks.first)
        loop.start()
    if loop.ranks.world > 1:
        own = encode(tree or {**snapshot(loop), "rows": {}}) if loop.ranks.first else b""
        tree = decode(loop.ranks.firsts(own))
    if tree is not None:
        restore(loop, tree)
        loop.result.log, loop.result.validation = (tree["rows"].get(name, []) for name in ("log", "validation"))
    if tree is None or not tree["done"]:
        snapshots.save(loop)
    else:
        snapshots.saved(loop)


def _go(loop: Loop, run: Run, train: Epochs, snapshots: Snapshots) -> dict[str, Any] | None:
    """Runs the loop to its end; says what ended it before that, as JSON has it."""
    shown = StepBar(loop, shown=run.progress and loop.ranks.first)
    try:
        with Interrupts() as interrupts, shown:
            for _ in loop.run(train):
                shown.update()
                if number := loop.ranks.largest(interrupts.asked):
                    return _interrupted(loop, run, snapshots, number)
                snapshots.save_if_due(loop)
            snapshots.save(loop)
    except NonFiniteError as error:
        loop.result.stopped = f"not finite at step {loop.done}"
        kept = "" if run.folder is None else f" It is saved in {run.folder}."
        return {"kind": "NonFiniteError", "message": f"{error}{kept}", "site": str(error.site)}
    except StorageError as error:
        loop.result.stopped = f"nothing could be written at step {loop.done}"
        go_on = f"Training stopped at step {loop.done}; go on from the last state that was saved with resume."
        return {"kind": "StorageError", "message": f"{error} {go_on}", "path": str(error.path)}
    return None


def _interrupted(loop: Loop, run: Run, snapshots: Snapshots, number: int) -> dict[str, Any]:
    snapshots.save(loop)
    where = f"at step {loop.done} of {loop.total}"
    loop.result.stopped = loop.result.stopped or f"interrupted at step {loop.done}"
    go_on = "" if run.folder is None else f" It is saved in {run.folder}; resume goes on from here."
    return {"signal": number, "message": f"training was interrupted {where}; the explainer can be used.{go_on}"}


def prepare(problem: Problem, train: Epochs, replay: Replay | None, ranks: Ranks, progress: bool) -> None:
    """Starts and fits the parts, and starts the objectives with the divergence of the fully masked model.

    Each rank reads the batches of all, so that what is gathered is the same.
    """
    _gather(problem, train, replay, ranks, progress)
    closed = closed_divergences(
        problem.hooked,
        problem.maskings,
        itertools.islice(train.batches, min(4, problem.recipe.statistics) * ranks.world),
        problem.divergence,
        ranks.device,
        replay,
    )
    for objective, divergence in zip(problem.objectives, closed, strict=True):
        objective.to(ranks.device)
        objective.start(divergence.mean())


def _gather(problem: Problem, train: Epochs, replay: Replay | None, ranks: Ranks, progress: bool) -> None:
    """Statistics of values, and the baselines that are fitted before any gate."""
    most = problem.recipe.statistics * ranks.world
    read = itertools.islice(train.batches, most)
    known = min(len(train.batches), most) if isinstance(train.batches, Sized) else None
    shown = track(read, "reading values", total=known, shown=progress)
    gather(problem.hooked, problem.maskings, shown, ranks.device, problem.penalty)
    fit_baselines(
        problem.hooked,
        problem.fit_first,
        train,
        problem.divergence,
        steps=problem.recipe.baseline_steps,
        ranks=ranks,
        seed=seeded(problem.seed, BASELINE),
        replay=replay,
        progress=progress,
    )


def _in_processes(fabric: Fabric, problem: Problem, run: Run) -> dict[str, Any]:
    """Trains in processes that the strategy starts, and brings back what the first one has."""
    interrupts = Interrupts(passed_on=True)
    try:
        with tempfile.TemporaryDirectory() as folder, interrupts:
            path = Path(folder) / "outcome"
            fabric.launch(functools.partial(_work, problem=problem, run=run, path=path))
            outcome: dict[str, Any] = decode(path.read_bytes())
    except ProcessException as error:
        if interrupts.asked:
            raise as_exception(interrupts.asked, "training was interrupted before its first step") from error
        raise
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SettingError(
            f"what is trained cannot be sent to another process ({error}). Use strategy='ddp_fork' on the CPU, "
            f"strategy='ddp' in a script, or give functions that stand in a module instead of lambdas."
        ) from error
    if outcome.get("failed") is not None:
        raise _exception(outcome["failed"])  # type: ignore[misc] # it is there
    put_parts(problem, outcome, device_of(problem.hooked.model))
    if interrupts.asked and outcome["cause"] is None:
        outcome["cause"] = {"signal": interrupts.asked, "message": "training was interrupted after its last step"}
    return outcome


def _work(fabric: Fabric, problem: Problem, run: Run, path: Path) -> None:
    """What a started process does; the first one writes the outcome to a file, since a queue holds little."""
    try:
        outcome = {**_train(fabric, problem, run), **parts_of(problem)}
    except MaskhooksError as error:
        outcome = {"failed": {"kind": type(error).__name__, "message": str(error)}}
        if fabric.global_rank > 0:
            print(f"process {fabric.global_rank}: {type(error).__name__}: {error}", file=sys.stderr)
    if fabric.global_rank == 0:
        path.write_bytes(encode(outcome))


def _exception(found: Mapping[str, Any] | None) -> BaseException | None:
    if found is None:
        return None
    if "signal" in found:
        return as_exception(found["signal"], found["message"])
    error: BaseException = getattr(errors, found["kind"])(
        found["message"], **{key: value for key, value in found.items() if key not in ("kind", "message")}
    )
    return error


def _fields(result: Fitted) -> dict[str, Any]:
    return {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "cause"}


def _about(fabric: Fabric, run: Run, total: int) -> dict[str, Any]:
    """What must be the same in a run that goes on."""
    loaders: dict[str, Any] = {"training batches": run.train, "validation batches": run.validation}
    sizes = {name: len(loader) for name, loader in loaders.items() if isinstance(loader, Sized)}
    ours = {"steps": total, "processes": fabric.world_size, "store": run.store is not None}
    return {**run.about, **sizes, **ours, "precision": fabric.strategy.precision.precision}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its notes on devices and precision, which do not concern masks."""
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
