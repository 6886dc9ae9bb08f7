"""A training run: the problem, the data, the options, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskhooks import errors
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.runs.interrupts import as_exception
from maskhooks.runs.tensorboard import Board
from maskhooks.settings.duration import Budget
from maskhooks.training.problem import Problem


@dataclass(frozen=True)
class Run:
    """A problem, the data to train on, and options.

    Args:
        problem: what is trained.
        train: training batches, read as often as needed.
        validation: batches on which checkpoints are compared; without them the last state is kept.
        steps: total number of training steps.
        epochs: instead of steps, the number of passes over `train`.
        budget: instead of steps, the time that the run may take.
        folder: where `log.csv`, `validation.csv` and the run's state are written during the run.
        resume: whether to resume from the state in the folder.
        save_every: seconds between two saved states; the state is also saved after each validation.
        metadata: what a resumed run must have in common with the saved one, JSON-serialisable.
        progress: whether to show progress on stderr.
        cache: keeps clean passes across epochs; later epochs repeat the batches of the first.
        board: where TensorBoard logs are written.
    """

    problem: Problem
    train: Iterable[Any]
    validation: Iterable[Any] | None = None
    steps: int = 0
    epochs: int = 0
    budget: Budget | None = None
    folder: Path | None = None
    resume: bool = False
    save_every: float = 60.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    cache: CleanCache | None = None
    board: Board | None = None


@dataclass
class FitResult:
    """The result of a training run.

    Attributes:
        log: a row per step: step, epoch, site, depth, multiplier, divergence (nats), expected_l0 (fraction), agreement.
        validation: a row per validation and group: step, site, depth, divergence, expected_l0, agreement.
        within_margin: whether the chosen state keeps the mean divergence of every group within the margin; None
            without validation data.
        over_margin: the groups whose mean divergence exceeds the margin.
        chosen_steps: for each group, the step whose state was kept.
        stop_reason: why training ended.
        seconds: how long the run took, with its preparation, and without the time between a stop and a resume.
        error: what ended training early, JSON-serialisable: the signal of an interruption or the class of an error,
            and the message.
    """

    log: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    within_margin: bool | None = None
    over_margin: list[str] = field(default_factory=list)
    chosen_steps: dict[str, int] = field(default_factory=dict)
    stop_reason: str = ""
    seconds: float = 0.0
    error: dict[str, Any] | None = None

    @property
    def cause(self) -> BaseException | None:
        """The exception that ended the run early, to raise once the explainer is saved."""
        return None if self.error is None else exception(self.error)


def exception(told: Mapping[str, Any]) -> BaseException:
    """Return the exception that `FitResult.error` describes."""
    if "signal" in told:
        return as_exception(told["signal"], told["message"])
    kind = getattr(errors, told["kind"])
    found: BaseException = kind(told["message"], **{k: v for k, v in told.items() if k not in ("kind", "message")})
    return found
