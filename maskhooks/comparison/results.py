"""Results of a comparison: rows, what metrics say of them, tests of differences, times."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maskhooks.metrics.intervals import Difference, Interval
from maskhooks.metrics.judgement import Judgement
from maskhooks.progress import duration

_LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """A row of a comparison: a method, with the masked site and the depth it is judged at.

    Attributes:
        method: the label of the method.
        site: the address of the site.
        depth: the depth that was read.
    """

    method: str
    site: str
    depth: int


@dataclass(frozen=True)
class Cell:
    """What a metric says of a row.

    Attributes:
        row: the row.
        metric: the label of the metric.
        judgement: the value of each example.
        interval: the mean with its interval, whose ends are NaN where there are fewer than two examples.
        best: whether the mean is the best at the site.
        p_best: the adjusted p-value of its difference from the best row at the site; 1 for the best itself, NaN where
            there is no test.
    """

    row: Row
    metric: str
    judgement: Judgement
    interval: Interval
    best: bool
    p_best: float

    @property
    def worse(self) -> bool:
        """Whether it differs from the best at the 5 % level."""
        return self.p_best < _LEVEL


@dataclass(frozen=True)
class Test:
    """The difference of two rows at one site by one metric, and whether it is real.

    Attributes:
        first, second: the rows.
        found: the mean of first minus second, with its interval, and the p-value of a paired permutation test.
        adjusted: the p-value adjusted by Holm's rule for all tests by this metric.
    """

    __test__ = False  # pytest, this is not for you

    first: Row
    second: Row
    found: Difference
    adjusted: float


@dataclass(frozen=True)
class Timing:
    """How long a method took.

    Attributes:
        seconds: for an example, explaining alone, in batches as they were given; without the first batch of each
            process where there are others, because it may take longer.
        first_seconds: for an example of the first batch.
        examples: how many examples `seconds` is a mean over.
        fit_seconds: for the training; None if there was none, or nobody knows.
    """

    seconds: float
    first_seconds: float
    examples: int
    fit_seconds: float | None


@dataclass(frozen=True)
class BreakEven:
    """After how many examples a trained method costs less than another, its training included.

    Attributes:
        method: the trained method.
        other: a method without training.
        fit_seconds: the training.
        seconds, other_seconds: of each for an example.
    """

    method: str
    other: str
    fit_seconds: float
    seconds: float
    other_seconds: float

    @property
    def examples(self) -> float:
        """The training time over what each example saves, rounded up; NaN where the trained method is no faster."""
        saved = self.other_seconds - self.seconds
        return float(math.ceil(self.fit_seconds / saved)) if saved > 0 else math.nan

    def __str__(self) -> str:
        each = f"{duration(self.seconds)} an example against {duration(self.other_seconds)}"
        if math.isnan(self.examples):
            return f"{self.method} never pays off against {self.other}: {each}."
        return (
            f"{self.method} costs less than {self.other} from {self.examples:,.0f} examples on: "
            f"{duration(self.fit_seconds)} of training, {each}."
        )
