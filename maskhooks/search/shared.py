"""Shared: a tree of states for a question, if a recurrent module reads the positions and its last state decides."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskhooks.errors import MaskhooksWarning
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.recurrence import Recurrence, Walk
from maskhooks.model.outputs import Outputs, parameters
from maskhooks.search.question import REFUSALS, Criterion
from maskhooks.search.repeated import Repeated
from maskhooks.search.tree import Tree
from maskhooks.seeds import generator

_TRIED = 24  # random sets that compare tree and model


@contextlib.contextmanager
def tree(question: Repeated, unchanged: Criterion, *, rows: int = 4096, memory: float = 2e9) -> Iterator[Tree | None]:
    """Yield the tree of a question, for use inside the `with`; None if the model is not a recurrence over positions.

    The tree of an adapter's recurrence is first compared with the model on random sets of positions: the module may
    read something other than the positions in order, or the model may use more than its last state.

    Args:
        unchanged: whether the prediction counts as unchanged, one bool per set.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(question.hooked.model))
        found = None
        for claim in question.hooked.claims if question.positions else ():
            recurrence = claim.adapter.recurrence(claim.name, claim.module)
            if recurrence is not None and found is None:
                with contextlib.ExitStack() as own:
                    own.enter_context(recurrence.opened())
                    found = _tree(question, unchanged, recurrence, rows, memory)
                    if found is not None:
                        stack.enter_context(own.pop_all())
        yield found


@torch.no_grad()
def _tree(question: Repeated, unchanged: Criterion, recurrence: Recurrence, rows: int, memory: float) -> Tree | None:
    alone = question.copies(1)
    inputs = []
    for kept in (True, False):
        question.masked(alone, torch.full((1, question.positions), kept))
        inputs.append(recurrence.inputs())
    opened, closed = inputs
    units = alone.units
    if opened is None or closed is None or opened.shape != closed.shape or units[-1][-1] >= len(opened):
        return None
    in_turn = all(one[-1] < other[0] for one, other in itertools.pairwise(units))
    if not in_turn or len(question.site.gating().gated) != 2:
        return None
    walk = recurrence.walk(opened, closed)
    sets = _some_sets(question.positions)
    wanted = parameters(question.masked(question.copies(len(sets)), sets))
    refusals: list[str] = []
    lengths = dict.fromkeys((walk.length, units[-1][-1] + 1))  # through padding, or to the last valid position
    for length in lengths:
        states = _final(walk, units, length, sets)
        for one_row in (True, False):
            ending = _Ending(question, unchanged, recurrence, whole=states[-1:].clone(), one_row=one_row)
            try:
                found = parameters(ending.outputs(states))
            except REFUSALS as error:  # another combination may work
                refusals.append(f"{type(error).__name__}: {error}")
                continue
            if _agree(found, wanted):
                return Tree(walk, units, ending.keeps, length=length, rows=rows, memory=memory)
    if len(refusals) == 2 * len(lengths):
        warnings.warn(
            f"the search at {question.site} cannot share the states of common prefixes, so it takes longer: the model "
            f"fails when its recurrent module returns only final states ({refusals[-1]}). The results are the same",
            MaskhooksWarning,
            stacklevel=2,
        )
    return None


class _Ending:
    """The rest of the model, run on final states, with one example for all of them or one per row.

    Args:
        whole: the final state with all positions kept, `1 state`.
    """

    def __init__(
        self, question: Repeated, unchanged: Criterion, recurrence: Recurrence, *, whole: Tensor, one_row: bool
    ) -> None:
        self.question, self.unchanged, self.recurrence = question, unchanged, recurrence
        self.whole, self.one_row = whole, one_row
        self._batch: tuple[int, object] | None = None
        self._original: tuple[int, Outputs] | None = None

    def outputs(self, states: Tensor) -> Outputs:
        question, count = self.question, 1 if self.one_row else len(states)
        if self._batch is None or self._batch[0] != count:
            numbers = [question.example] * count
            self._batch = count, question.hooked.task.select(question.clean.batch, numbers, question.count)
        with self.recurrence.answering(states):
            result = question.hooked(self._batch[1])
            return question.hooked.distribution(result, self._batch[1])

    def keeps(self, states: Tensor) -> Tensor:
        if self._original is None or self._original[0] != len(states):
            self._original = len(states), self.outputs(self.whole.expand(len(states), -1))
        return self.unchanged(self._original[1], self.outputs(states)).cpu()


def _some_sets(positions: int) -> Bool[Tensor, "set position"]:
    """Random sets of positions, from none to all."""
    shares = torch.rand(_TRIED, positions, generator=generator(0, _TRIED))
    kept = shares < torch.linspace(0, 1, _TRIED)[:, None]
    kept[0], kept[-1] = False, True
    return kept


def _final(
    walk: Walk, units: list[list[int]], length: int, kept: Bool[Tensor, "set position"]
) -> Float[Tensor, "set state"]:
    """Return the state of each set after `length` steps."""
    owners = {step: number for number, unit in enumerate(units) for step in unit}
    states = walk.first.repeat(len(kept), 1)
    for at in range(length):
        after = states.clone()
        walk.step(at, states, states, after)
        chosen = kept[:, owners[at], None] if at in owners else torch.ones(1, 1, dtype=torch.bool)
        states = torch.where(chosen.to(states.device), after, states)
    return states


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
        for one, other in zip(found, wanted, strict=True)
    )
