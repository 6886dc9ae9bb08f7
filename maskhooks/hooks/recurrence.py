"""Recurrence: a module that reads positions in sequence, so that sets with a common prefix share states."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class Walk(ABC):
    """The steps of a recurrence for one example, from any number of states at once.

    A state is a row of a tensor that holds whatever the recurrence carries forward.

    Attributes:
        first: the state before the first step.
        length: the number of steps.
    """

    first: Float[Tensor, "1 state"]
    length: int

    @abstractmethod
    def step(
        self,
        at: int,
        states: Float[Tensor, "row state"],
        closed: Float[Tensor, "row state"] | None,
        kept: Float[Tensor, "row state"] | None,
    ) -> None:
        """Compute the states after step `at`, for a closed position's input and for a kept one's.

        Args:
            closed, kept: where the new states go; None if not needed. `closed`, or `kept` if it is the only one, may
                be `states` itself.
        """


class Recurrence(ABC):
    """A recurrent module whose forward an adapter replaces within `opened`; see `Adapter.recurrence`."""

    @abstractmethod
    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Open a context in which the methods below work; it restores the module."""

    @abstractmethod
    def inputs(self) -> Float[Tensor, "step feature"] | None:
        """Return the first sequence's inputs in the module's last call; None if there were none."""

    @abstractmethod
    def walk(self, kept: Float[Tensor, "step feature"], closed: Float[Tensor, "step feature"]) -> Walk:
        """Return the steps for the inputs of kept and of closed positions, in the form that `inputs` returns."""

    @abstractmethod
    def answering(self, states: Float[Tensor, "row state"]) -> contextlib.AbstractContextManager[None]:
        """Open a context in which the module returns results that end in these states, without computing.

        Each row is one sequence. The module may be called there with one sequence, or with one per row.
        """
