"""Snapshots: the whole state of a loop as a tree, saved during the run; a resumed run gets the same numbers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskhooks.data.epochs import Epochs
from maskhooks.errors import ResumeError
from maskhooks.runs.run_state import delete_states, load_state, save_state, state_folder
from maskhooks.sites import nested
from maskhooks.training.loop import Loop
from maskhooks.training.problem import Problem


class Snapshots:
    """Saves a loop's state from time to time, and loads it; does nothing without a folder.

    Args:
        run_dir: the run's folder.
        metadata: what a resumed run must have in common with the saved one, JSON-serialisable.
        every: seconds between two states.
    """

    def __init__(self, run_dir: Path | None, metadata: Mapping[str, Any], every: float) -> None:
        self.folder = None if run_dir is None else state_folder(run_dir)
        self.metadata, self.every = dict(metadata), every
        self._last = (-1, -1)  # steps and validations at the latest save
        self._time = time.monotonic()

    def find(self) -> dict[str, Any] | None:
        """Return the last good state of this run, or None.

        Raises:
            ResumeError: the state belongs to another run; the message lists the differences.
            CorruptFileError: all saved states are broken.
        """
        tree = None if self.folder is None else load_state(self.folder)
        if tree is None:
            return None
        found = differences(tree["metadata"], self.metadata)
        if found:
            raise ResumeError(
                f"{self.folder} holds a run with other settings: {'; '.join(found)}. Give the same settings, restart "
                f"without resume (--overwrite), or use another folder.",
                path=self.folder,
                differences=found,
            )
        assert isinstance(tree, dict)
        return tree

    def drop(self) -> None:
        """Delete the states of an earlier run."""
        if self.folder is not None:
            delete_states(self.folder)

    def save_if_due(self, loop: Loop) -> None:
        """Save after a validation, or if the latest save is long enough ago."""
        if time.monotonic() - self._time >= self.every or len(loop.result.validation) != self._last[1]:
            self.save(loop)

    def save(self, loop: Loop) -> None:
        """Save the state between two steps.

        Raises:
            StorageError: the state cannot be written; earlier states are untouched.
        """
        if self.folder is None or (loop.done, len(loop.result.validation)) == self._last:
            return
        positions = loop.log.positions()
        save_state(self.folder, loop.done, {**snapshot(loop), "metadata": self.metadata, "log": positions})
        self.saved(loop)

    def saved(self, loop: Loop) -> None:
        """Note that the folder holds the current state."""
        self._last, self._time = (loop.done, len(loop.result.validation)), time.monotonic()


def snapshot(loop: Loop) -> dict[str, Any]:
    """Return the loop's state as a tree of tensors, numbers and strings, without the rows of its log."""
    return {
        "done": loop.done,
        "epoch": loop.epoch,
        "index": loop.index,
        "stale": loop.stale,
        "progress": loop.progress,
        "pace": loop.pace.state(),
        "resting": sorted(loop.resting),
        "stop_reason": loop.result.stop_reason,
        "seconds": loop.result.seconds,
        "batch": digest(loop.batch),
        **parts_of(loop.problem),
        "penalty": loop.problem.penalty.state_dict(),
        "draws": loop.evaluation.draws,
        "objectives": [objective.state_dict() for objective in loop.problem.objectives],
        "optimizer": _optimizer_tree(loop.optimizer.state_dict()),
        "scaler": scaler.state_dict() if (scaler := _scaler(loop)) is not None else None,
        "checkpoints": [checkpoint.snapshot() for checkpoint in loop.checkpoints],
    }


def restore(loop: Loop, tree: Mapping[str, Any]) -> None:
    """Restore a loop from what `snapshot` returned; its parts need not be started."""
    loop.done, loop.epoch, loop.index = tree["done"], tree["epoch"], tree["index"]
    loop.stale, loop.result.stop_reason = tree["stale"], tree["stop_reason"]
    loop.progress = tree["progress"]
    loop.result.seconds = tree["seconds"]
    loop.pace.resume(tree["pace"])
    loop.resting.update(tree["resting"])
    put_parts(loop.problem, tree, loop.ranks.device)
    loop.problem.penalty.load_state_dict(tree["penalty"])
    loop.evaluation.draws = tree.get("draws")
    for objective, state in zip(loop.problem.objectives, tree["objectives"], strict=True):
        objective.to(loop.ranks.device).load_state_dict(state)
    loop.start()
    loop.optimizer.load_state_dict(_optimizer_state(tree["optimizer"]))
    if (scaler := _scaler(loop)) is not None:
        scaler.load_state_dict(tree["scaler"])
    for checkpoint, held in zip(loop.checkpoints, tree["checkpoints"], strict=True):
        checkpoint.take(held)


def parts_of(problem: Problem) -> dict[str, Any]:
    """Return the sizes and states of the trained parts, and the names of their frozen weights."""
    return {
        "sizes": [masking.sizes for masking in problem.maskings],
        "parts": [part.state_dict() for part in problem.modules],
        "kept": [[name for name, w in part.named_parameters() if not w.requires_grad] for part in problem.modules],
    }


def put_parts(problem: Problem, tree: Mapping[str, Any], device: torch.device) -> None:
    """Start the parts if needed, and load the states that `parts_of` returned."""
    for masking, sizes in zip(problem.maskings, tree["sizes"], strict=True):
        masking.start(sizes, device)
    for part, state, kept in zip(problem.modules, tree["parts"], tree["kept"], strict=True):
        part.load_state_dict(state)
        _keep(part, kept)


def check_batch(tree: Mapping[str, Any], train: Epochs) -> None:
    """Raise ResumeError if the loader does not yield the batch that the run saw last."""
    if not tree["index"]:
        return
    _, _, batch = next(train.batches_from(tree["epoch"], tree["index"] - 1))
    if digest(batch) != tree["batch"]:
        raise ResumeError(
            f"batch {tree['index'] - 1} of epoch {tree['epoch']} differs from the one that the run saw, so the run "
            f"cannot resume to the same result. Give the same data, in an order that torch draws from its global "
            f"random state or from a generator of the loader or sampler; or restart without resume.",
            differences=["the batches"],
        )


def digest(batch: Any) -> str:
    """Return a hash of a batch's tensors."""
    found = hashlib.sha256()
    for _, tensor in nested.tensors(batch):
        whole = tensor.detach().to("cpu").contiguous().reshape(-1)
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
    return found.hexdigest()


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], name: str = "") -> list[str]:
    """Describe the differences between two mappings of settings."""
    found: list[str] = []
    for key in sorted({*saved, *present}):
        one, other = saved.get(key), present.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{name}{key}.")
        elif one != other:
            found.append(f"{name}{key} was {_short(one)} and is {_short(other)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _scaler(loop: Loop) -> Any:
    return getattr(loop.fabric.strategy.precision, "scaler", None)


def _keep(part: nn.Module, kept: Sequence[str]) -> None:
    for name, weight in part.named_parameters():
        weight.requires_grad_(name not in kept)


def _optimizer_tree(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state without numbers as keys, which JSON lacks."""
    return {**state, "state": [[key, value] for key, value in state["state"].items()]}


def _optimizer_state(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {**tree, "state": dict(tree["state"])}
