"""A training run: what is trained, on what and how, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskhooks import errors
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.runs.interrupts import as_exception
from maskhooks.runs.tensorboard import Board
from maskhooks.training.problem import Problem


@dataclass(frozen=True)
class Run:
    """A problem, the data that it is trained on, and how.

    Args:
        problem: what is trained.
        train: batches; gone through as often as needed.
        validation: batches on which checkpoints are compared; without them the last state is kept.
        steps: training steps in all.
        epochs: instead of steps, how often to go through `train`.
        folder: where `log.csv`, `validation.csv` and the state of the run are written while it goes on.
        resume: whether to go on from the state in the folder.
        save_every: seconds between two states; there is one after each validation too.
        metadata: what a run must have in common with the one it goes on from, as JSON has it.
        progress: whether a progress bar is shown on stderr.
        store: keeps clean passes across epochs; the batches of the first epoch come again in the later ones.
        board: where the logs are written for TensorBoard.
    """

    problem: Problem
    train: Iterable[Any]
    validation: Iterable[Any] | None = None
    steps: int = 0
    epochs: int = 0
    folder: Path | None = None
    resume: bool = False
    save_every: float = 60.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    cache: CleanCache | None = None
    board: Board | None = None


@dataclass
class FitResult:
    """What a training run leaves behind.

    Attributes:
        log: a row a step: step, epoch, site, depth, multiplier, divergence (nats), expected_l0 (fraction), agreement.
        validation: a row a validation and group: step, site, depth, divergence, expected_l0, agreement.
        within_margin: whether the chosen state keeps the mean divergence of every group within the margin; None
            without validation data.
        over_margin: the groups whose mean divergence exceeds the margin all the same.
        chosen_steps: by group the step whose state was kept.
        stop_reason: why training ended.
        error: what ended it before its time, as JSON has it: the signal of an interruption, or the kind of an error,
            and its message.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    within_margin: bool | None = None
    over_margin: list[str] = field(default_factory=list)
    chosen_steps: dict[str, int] = field(default_factory=dict)
    stop_reason: str = ""
    error: dict[str, Any] | None = None

    @property
    def cause(self) -> BaseException | None:
        """What ended the run before its time, to be raised once the explainer is in order."""
        return None if self.error is None else exception(self.error)


def exception(told: Mapping[str, Any]) -> BaseException:
    """The exception that `FitResult.error` tells of."""
    if "signal" in told:
        return as_exception(told["signal"], told["message"])
    kind = getattr(errors, told["kind"])
    found: BaseException = kind(told["message"], **{k: v for k, v in told.items() if k not in ("kind", "message")})
    return found
