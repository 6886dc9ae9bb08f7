"""Pace: how far a training run is, by its steps or by its budget of time, and how long the rest will take."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from maskhooks.progress import duration, rough
from maskhooks.settings.duration import Budget

_LATEST = 0.1  # weight of the latest measurement
_WARM, _CHECKING = 0.2, 0.25  # the most of a budget for a warm start, and for comparisons of checkpoints


@dataclass
class Timing:
    """A running mean of how long something takes, in seconds."""

    mean: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """Add a measurement."""
        self.count += 1
        self.mean += (seconds - self.mean) * max(1 / self.count, _LATEST)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Time what is inside the `with` block."""
        begun = time.monotonic()
        yield
        self.add(time.monotonic() - begun)


@dataclass
class Pace:
    """How far a run is, from 0 to 1, and an estimate of the rest from steps that were timed.

    Args:
        total: the number of steps; 0 with a budget.
        budget: the time that the run may take; None with a number of steps.
        checks: how often checkpoints are compared.
        groups: how many groups are trained.
        stored: batches whose clean pass is computed once and stored; 0 if each step computes its own.
        together: how many groups a step trains.
        calibrations: how many comparisons follow the last one; with a budget, there may be fewer of both.

    Attributes:
        steps: for each group, how long its masked half of a step takes.
        computed: the fraction of the stored batches that do not fit, so that each step computes their clean pass.
        clean: how long a clean pass takes.
        check: how long it takes to compare checkpoints.
        checked: how many comparisons are done.
        resting: the groups that are not trained now.
    """

    total: int
    budget: Budget | None
    checks: int
    groups: int
    stored: int
    together: int = 1
    calibrations: int = 0
    steps: list[Timing] = field(init=False)
    clean: Timing = field(default_factory=Timing)
    check: Timing = field(default_factory=Timing)
    checked: int = 0
    computed: float = 0.0
    resting: set[int] = field(default_factory=set)
    _begun: float = field(default_factory=lambda: time.monotonic())
    _first_step: float = 0.0  # seconds elapsed before the first step

    def __post_init__(self) -> None:
        self.steps = [Timing() for _ in range(self.groups)]
        if self.budget is not None and self.budget.begun is not None:
            self._begun = self.budget.begun

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, also those before it was resumed."""
        return time.monotonic() - self._begun

    @property
    def for_warm_start(self) -> float:
        """The seconds that a warm start may take."""
        return math.inf if self.budget is None else _WARM * self.budget.seconds

    @property
    def step_seconds(self) -> float:
        """The mean time of a step, without the clean passes that are stored."""
        trained = [number for number in range(len(self.steps)) if number not in self.resting] or range(len(self.steps))
        mean = sum(self.steps[number].mean for number in trained) / len(trained)
        clean = self.computed if self.stored else 1.0
        return min(self.together, len(trained)) * mean + clean * self.clean.mean

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"checked": self.checked, "elapsed": self.elapsed, "first_step": self._first_step}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run was."""
        self.checked = state["checked"]
        self._begun, self._first_step = time.monotonic() - state["elapsed"], state["first_step"]

    def begin(self) -> str:
        """Note that the first step is next; return what is wrong if there is no time for a step of each group.

        With a budget, checkpoints are compared less often if that would take much of it: the last comparison and the
        calibrations after it come first.
        """
        self._first_step = self._first_step or self.elapsed
        if self.budget is None:
            return ""
        if self.check.mean:
            most = int(_CHECKING * self.budget.seconds / self.check.mean)
            self.calibrations = max(0, min(self.calibrations, most - 1))
            self.checks = max(1, min(self.checks, most - self.calibrations))
        steps = -(-len(self.steps) // self.together)
        least = self._first_step + self._stored_seconds(steps) + self._after + steps * self.step_seconds
        if least <= self.budget.seconds:
            return ""
        return (
            f"a budget of {duration(self.budget.seconds)} is too short: the preparation took "
            f"{duration(self._first_step)}, and one step for each of {len(self.steps)} masks, with checks, would "
            f"end after {duration(least)}. Give at least twice that, fewer sites, or smaller batches."
        )

    def progress(self, done: int) -> float:
        """Return how far the run is after this many steps, from 0 to 1."""
        if self.budget is None:
            return done / self.total
        room = self.budget.seconds - self._after - self._first_step
        return min(1.0, (self.elapsed - self._first_step) / room) if room > 0 else 1.0

    def planned(self, done: int) -> int:
        """Return the number of steps in all, with a budget as estimated after this many steps."""
        if self.budget is None:
            return self.total
        room = self.budget.seconds - self._after - self.elapsed - self._checks_left * self.check.mean
        if not self.step_seconds:
            return done
        fresh = max(0, self.stored - done)  # steps that store their clean pass
        extra = self._stored_seconds(fresh)
        whole = self.step_seconds + (extra / fresh if fresh else 0.0)
        if room > fresh * whole:
            return done + int((room - extra) / self.step_seconds)
        return done + max(0, int(room / whole))

    def left(self, done: int) -> float:
        """Return the seconds that the rest will take."""
        if self.budget is not None:
            return max(0.0, self.budget.seconds - self.elapsed)
        steps = (self.total - done) * self.step_seconds + self._stored_seconds(min(self.stored, self.total) - done)
        return steps + (self._checks_left + self.calibrations) * self.check.mean

    def due(self, progress: float) -> bool:
        """Whether it is time to compare checkpoints."""
        return int(progress * self.checks + 1e-9) > self.checked

    def note_check(self, progress: float) -> None:
        """Note that checkpoints were compared at this progress."""
        self.checked = int(progress * self.checks + 1e-9)
        if progress >= 1:
            self.calibrations = 0  # done with the last comparison

    def end(self, done: int) -> str:
        """Return why the run ends after this many steps."""
        if self.budget is None:
            return f"all {self.total} steps were done"
        return f"the budget of {duration(self.budget.seconds)} was spent, after {done} steps"

    def plan(self, masks: int, recipe: str, done: int = 0) -> str:
        """Return a sentence on what the run will do and how long it will take."""
        what = f"{masks} mask{'s' * (masks > 1)} with the recipe {recipe}"
        step = f"{duration(self.step_seconds)} a step, measured on two"
        if self.budget is not None:
            spent = f", of which {duration(self.elapsed)} are spent" if self.elapsed >= 1 else ""
            budget = duration(self.budget.seconds)
            return f"Training {what} within {budget}{spent}: about {self.planned(done):,} steps, {step}."
        way_out = "To end sooner, give a budget such as 5m, fewer sites, or fewer examples."
        steps = f"{self.total - done:,}{' more' if done else ''} steps"
        return f"Training {what} in {steps} takes about {rough(self.left(done))}, {step}. {way_out}"

    @property
    def _after(self) -> float:
        """Seconds to keep for what follows the last step: the last comparison, and what the caller does."""
        follow = 1 + self.calibrations + (0 if self.budget is None else self.budget.checks_after)
        return self.check.mean * follow

    @property
    def _checks_left(self) -> int:
        return max(0, self.checks - self.checked)

    def _stored_seconds(self, batches: int) -> float:
        return max(0, batches) * self.clean.mean if self.stored and not self.computed else 0.0


def interpolated(first: float, last: float, count: int) -> list[Timing]:
    """Return a timing for each of several groups, between those of the first and the last one."""
    return [Timing(last + (first - last) * rest / max(1, count - 1), 1) for rest in reversed(range(count))]
