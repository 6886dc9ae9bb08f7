"""A training run in processes started for it; the result of the first process is returned."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch.multiprocessing.spawn import ProcessException

from maskhooks.errors import MaskhooksError, SettingError
from maskhooks.model.task import device_of
from maskhooks.runs.interrupts import Interrupts, as_exception
from maskhooks.runs.run_state import decode, encode
from maskhooks.training.one_process import run_here
from maskhooks.training.run import FitResult, Run, exception
from maskhooks.training.snapshot import parts_of, put_parts


def run_in_processes(fabric: Fabric, run: Run) -> FitResult:
    """Train in processes that the strategy starts, and return the result of the first one."""
    interrupts = Interrupts(passed_on=True)
    try:
        with tempfile.TemporaryDirectory() as folder, interrupts:
            path = Path(folder) / "outcome"
            fabric.launch(functools.partial(_work, run=run, path=path))
            outcome: dict[str, Any] = decode(path.read_bytes())
    except ProcessException as error:
        if interrupts.asked:
            raise as_exception(interrupts.asked, "training was interrupted before its first step") from error
        raise
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SettingError(
            f"what is trained cannot be sent to another process ({error}). Use strategy='ddp_fork' on the CPU, "
            f"strategy='ddp' in a script, or functions defined in a module instead of lambdas."
        ) from error
    if "failed" in outcome:
        raise exception(outcome["failed"])
    put_parts(run.problem, outcome, device_of(run.problem.hooked.model))
    result = FitResult(**outcome["result"])
    if interrupts.asked and result.error is None:
        result.error = {"signal": interrupts.asked, "message": "training was interrupted after its last step"}
    return result


def _work(fabric: Fabric, run: Run, path: Path) -> None:
    """Train in a started process; the first one writes the outcome to a file, because a queue holds little."""
    try:
        outcome = {"result": dataclasses.asdict(run_here(fabric, run)), **parts_of(run.problem)}
    except MaskhooksError as error:
        outcome = {"failed": {"kind": type(error).__name__, "message": str(error)}}
        if fabric.global_rank > 0:
            print(f"process {fabric.global_rank}: {type(error).__name__}: {error}", file=sys.stderr)
    if fabric.global_rank == 0:
        path.write_bytes(encode(outcome))
