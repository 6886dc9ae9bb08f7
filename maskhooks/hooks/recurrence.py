"""Recurrence: a module that reads positions one after another, so that sets with a common beginning share states."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class Walk(ABC):
    """The steps of a recurrence for one example, from any number of states at once.

    A state is a row of a tensor, of whatever the recurrence carries on.

    Attributes:
        first: the state before the first step.
        length: how many steps there are.
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
        """The states after step `at`, with the input of a closed position and with that of a kept one.

        Args:
            closed, kept: where the new states go; None where they are not wanted. `closed`, or `kept` where it is the
                only one, may be `states` itself.
        """


class Recurrence(ABC):
    """A recurrent module, whose forward an adapter takes over while `opened` lasts; see `Adapter.recurrence`."""

    @abstractmethod
    def opened(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the methods below serve; it restores the module."""

    @abstractmethod
    def inputs(self) -> Float[Tensor, "step feature"] | None:
        """What the module was given in its last call, of the first sequence; None where it had none."""

    @abstractmethod
    def walk(self, kept: Float[Tensor, "step feature"], closed: Float[Tensor, "step feature"]) -> Walk:
        """Steps with the inputs of kept positions and of closed ones, as `inputs` gave them."""

    @abstractmethod
    def answering(self, states: Float[Tensor, "row state"]) -> contextlib.AbstractContextManager[None]:
        """A context in which the module computes nothing, and returns what ends in these states, one sequence a row.

        It may be called there with one sequence, or with as many as there are rows.
        """
