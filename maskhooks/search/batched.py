"""Batched search: try a set of rows of each example in one pass, where examples have several rows, such as edges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from maskhooks.errors import MaskhooksError, MaskhooksWarning, SettingError
from maskhooks.masks.baselines import Baseline
from maskhooks.model.outputs import Outputs, parameters
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.search.question import REFUSALS, Criterion, Question, masking_of, units_of
from maskhooks.search.scheduler import SearchSteps, run_together
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site

T = TypeVar("T")
_ROWS = 2**16  # maximum rows of a batch that repeats examples; large graphs would fill the memory


class _Picked(NamedTuple):
    """Questions about examples from another one: their indices there, and how often each is repeated."""

    numbers: list[int]
    times: int
    batch_questions: BatchQuestions


class BatchQuestions:
    """Questions about all examples of a batch, such as the edges of its graphs, answered together.

    Args:
        clean: the clean pass of the batch, which has read the site.
        site: the site whose rows are closed; its first axis holds rows, several per example.
        baseline: what replaces a closed row.
        rows: sets in one pass, over all examples; one per example if the task cannot select examples.

    Attributes:
        members: the questions, one per example.
    """

    def __init__(
        self,
        clean: Clean,
        site: Site,
        baseline: Baseline,
        *,
        rows: int = 64,
    ) -> None:
        self.clean, self.site = clean, site
        self._baseline, self._rows = baseline, rows
        self.masking = masking_of(clean, site, baseline)
        self._value = clean.values[site]
        self._shape = site.gating().mask_shape(self._value, site=site)
        here = clean.places[site]
        assert here.example_index is not None
        self._places = Places(here.valid)
        index = here.example_index.index.cpu()
        parts = index.argsort(stable=True).split(torch.bincount(index, minlength=here.example_index.count).tolist())
        self.members = [RowQuestion(self, here, part, example, rows) for example, part in enumerate(parts)]
        owners, first = torch.full((math.prod(self._shape),), -1), 0
        for one in self.members:
            one.write(torch.arange(first, first + one.positions), owners)
            first += one.positions
        self._gates = (owners >= 0).nonzero()[:, 0]
        self._owners = owners[self._gates]  # each gate's position among those of all examples
        self._all = self._picked = _Picked([*range(len(self.members))], 1, self)
        self._pickable = True

    def answer(self, searches: Sequence[SearchSteps[T]], function: Criterion) -> list[T]:
        """Run each example's search and return the results."""
        return run_together(searches, lambda sets: self.measured(sets, function))

    def measured(self, sets: Mapping[int, Bool[Tensor, "set position"]], function: Criterion) -> Mapping[int, Tensor]:
        """Apply a function to the original outputs and those with only the first sets of each example kept.

        Args:
            sets: the sets of some examples, by example index; the others keep all their rows.
        """
        there = self._there(sets)
        kept: dict[int, Tensor] = {}
        places: dict[int, list[int]] = {number: [] for number in sets}
        for at, number in enumerate(there.numbers):
            if number in sets and len(places[number]) < len(sets[number]):
                kept[at] = sets[number][len(places[number])]
                places[number].append(at)
        found = there.batch_questions._pass(kept, function)
        return {number: found[at] for number, at in places.items()}

    def _there(self, sets: Mapping[int, Tensor]) -> _Picked:
        """Return the examples of a pass: all, or those asked about, repeated if there is room."""
        here = self._picked
        if not sets.keys() <= set(here.numbers):
            here = self._picked = self._all
        times = 1
        if max(map(len, sets.values())) > 1:
            asked = [self.members[number] for number in sets]
            room = _ROWS // max(1, sum(len(one.own) for one in asked))
            times = max(1, min(self._rows // len(sets), room, max(one.positions for one in asked)))
        fewer = 2 * len(sets) * here.times <= len(here.numbers)
        if self._pickable and (fewer or times > here.times == 1):
            found = self._pick([*sets] * times, times)
            self._pickable = found is not None
            self._picked = found or self._all
        return self._picked

    def _pick(self, numbers: list[int], times: int) -> _Picked | None:
        """Return the questions about some examples; None if the task cannot select them, or the results differ."""
        batch = self.clean.hooked.task.select_rows(self.clean.batch, numbers)
        if batch is None:
            return None
        try:
            clean = clean_pass(self.clean.hooked, batch, [self.site])
        except MaskhooksError:  # not a batch to the task, such as one sampled around some nodes
            return None
        except REFUSALS as error:
            self._warn(f"the model fails on a batch of selected examples ({type(error).__name__}: {error})")
            return None
        try:
            batch_questions = BatchQuestions(clean, self.site, self._baseline)
        except MaskhooksError:
            return None
        given = [self.members[number] for number in numbers]
        alike = (
            [one.units for one in batch_questions.members] == [one.units for one in given]
            and _close(batch_questions._values(batch_questions.members), self._values(given))
            and _same_outputs(clean.outputs, self.clean.outputs, numbers)
        )
        if not alike:
            self._warn("in a batch of selected examples, some have different values or different outputs")
            return None
        return _Picked(numbers, times, batch_questions)

    def _warn(self, reason: str) -> None:
        """Warn that passes take longer than necessary."""
        warnings.warn(
            f"the search at {self.site} runs the whole batch in every pass, which takes longer: {reason}. The results "
            "are the same. Say how to select examples: wrap(model, select=lambda batch, numbers: ...)",
            MaskhooksWarning,
            stacklevel=2,
        )

    def _values(self, members: Sequence[RowQuestion]) -> Tensor:
        """Return the rows of some members, concatenated."""
        return self._value[[row for one in members for row in one.own]]

    @torch.no_grad()
    def _pass(self, sets: Mapping[int, Bool[Tensor, " position"]], function: Criterion) -> Tensor:
        """Apply the function with one set per question, and with all rows of those that have none."""
        kept = [sets.get(one.example, one.whole) for one in self.members]
        found = function(self.clean.outputs, self._masked(torch.cat(kept))).cpu()
        if len(found) != len(self.members):
            raise SettingError(
                f"the criterion or divergence returned {len(found)} rows for {len(self.members)} examples. Return one "
                "row per example"
            )
        return found

    def _masked(self, kept: Bool[Tensor, " position"]) -> Outputs:
        """Return the outputs with only these positions of all examples kept."""
        sample = torch.ones(math.prod(self._shape))
        sample[self._gates] = kept[self._owners].to(sample)
        sample = sample.view(self._shape).to(self._value.device)
        masked = self.masking.mask(self._value, self._places, sample)
        return onward_pass(self.clean, {self.site: self.masking.replacement(masked)})


class RowQuestion(Question):
    """The question of one example in a batch.

    Args:
        batch_questions: the questions of its batch.
        here: the positions of the whole batch.
        own: the example's rows.
        example, rows: as in `Question`.
    """

    def __init__(self, batch_questions: BatchQuestions, here: Places, own: Tensor, example: int, rows: int) -> None:
        super().__init__(batch_questions.site, example, rows)
        self.batch_questions = batch_questions
        self.own: list[int] = own.tolist()
        value, pattern = batch_questions.clean.values[batch_questions.site], batch_questions.site.gating()
        self._width = math.prod(pattern.mask_shape(value, site=batch_questions.site)[1:])
        self.units = units_of(pattern, pattern.shape(value, site=batch_questions.site), here, own)
        self.whole = torch.ones(self.positions, dtype=torch.bool)

    def number(self, gate: int) -> int:
        return self.own[gate // self._width] * self._width + gate % self._width

    def measured(self, kept: Bool[Tensor, "row position"], function: Criterion) -> Tensor:
        found = []
        while len(kept):
            found.append(self.batch_questions.measured({self.example: kept}, function)[self.example])
            kept = kept[len(found[-1]) :]
        return torch.cat(found)


def _same_outputs(outputs: Outputs, others: Outputs, numbers: list[int]) -> bool:
    """Whether outputs match the others' at these indices."""
    return all(_close(one, other[numbers]) for one, other in zip(parameters(outputs), parameters(others), strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
