"""Batched search: examples that each have rows of their own, such as edges; one pass tries a set of rows of each."""

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
from maskhooks.search.question import REFUSALS, Judge, Question, masking_of, units_of
from maskhooks.search.scheduler import Asking, abreast
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site

T = TypeVar("T")
_ROWS = 2**16  # of a batch that holds examples several times; one of large graphs would fill the memory


class _Picked(NamedTuple):
    """A panel of examples of another one: their numbers there, and how often each is among them."""

    numbers: list[int]
    times: int
    panel: Panel


class Panel:
    """Questions about all examples of a batch, such as the edges of its graphs, which are answered together.

    Args:
        clean: the clean pass of the batch, which has read the site.
        site: what is closed row by row; its first axis are rows, several to an example.
        baseline: what a closed row gets.
        rows: sets in one pass, of all examples together; where it is not known how to make a batch of some of its
            examples, as many as there are examples.

    Attributes:
        members: the questions, one for each example.
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
        assert here.examples is not None
        self._places = Places(here.valid)
        index = here.examples.index.cpu()
        parts = index.argsort(stable=True).split(torch.bincount(index, minlength=here.examples.count).tolist())
        self.members = [Member(self, here, part, example, rows) for example, part in enumerate(parts)]
        owners, first = torch.full((math.prod(self._shape),), -1), 0
        for one in self.members:
            one.write(torch.arange(first, first + one.positions), owners)
            first += one.positions
        self._gates = (owners >= 0).nonzero()[:, 0]
        self._owners = owners[self._gates]  # of each gate, its position among those of all examples
        self._all = self._picked = _Picked([*range(len(self.members))], 1, self)
        self._pickable = True

    def answer(self, askings: Sequence[Asking[T]], function: Judge) -> list[T]:
        """What each example's asking finds out."""
        return abreast(askings, lambda sets: self.measured(sets, function))

    def measured(self, sets: Mapping[int, Bool[Tensor, "set position"]], function: Judge) -> Mapping[int, Tensor]:
        """A function of what the model says of examples as they are and with some of their sets alone, from the first.

        Args:
            sets: of some of the examples, by their numbers; the others keep all their rows.
        """
        there = self._there(sets)
        kept: dict[int, Tensor] = {}
        places: dict[int, list[int]] = {number: [] for number in sets}
        for at, number in enumerate(there.numbers):
            if number in sets and len(places[number]) < len(sets[number]):
                kept[at] = sets[number][len(places[number])]
                places[number].append(at)
        found = there.panel._pass(kept, function)
        return {number: found[at] for number, at in places.items()}

    def _there(self, sets: Mapping[int, Tensor]) -> _Picked:
        """The examples that a pass has: all, or those that are asked about, several times over where there is room."""
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
        """A panel of some examples; None where it is not known how to make their batch, or the batch does not serve."""
        batch = self.clean.hooked.task.picked(self.clean.batch, numbers)
        if batch is None:
            return None
        try:
            clean = clean_pass(self.clean.hooked, batch, [self.site])
        except MaskhooksError:  # to the task it is no batch, as one that was sampled around some nodes
            return None
        except REFUSALS as error:
            self._tell(f"the model fails on a batch of some examples ({type(error).__name__}: {error})")
            return None
        try:
            panel = Panel(clean, self.site, self._baseline)
        except MaskhooksError:
            return None
        given = [self.members[number] for number in numbers]
        alike = (
            [one.units for one in panel.members] == [one.units for one in given]
            and _close(panel._values(panel.members), self._values(given))
            and _are(clean.outputs, self.clean.outputs, numbers)
        )
        if not alike:
            self._tell("in a batch of some examples, their values there or their outputs are others")
            return None
        return _Picked(numbers, times, panel)

    def _tell(self, reason: str) -> None:
        """Says once that passes take longer than they might."""
        warnings.warn(
            f"the search at {self.site} runs the batch as it is in every pass, which takes longer: {reason}. What is "
            "found is the same. Say how such a batch is made: wrap(model, select=lambda batch, numbers: ...)",
            MaskhooksWarning,
            stacklevel=2,
        )

    def _values(self, members: Sequence[Member]) -> Tensor:
        """The rows of some members, one's after another's."""
        return self._value[[row for one in members for row in one.own]]

    @torch.no_grad()
    def _pass(self, sets: Mapping[int, Bool[Tensor, " position"]], function: Judge) -> Tensor:
        """The function for a set of each, and for all rows of those that have none here."""
        kept = [sets.get(one.example, one.whole) for one in self.members]
        found = function(self.clean.outputs, self._masked(torch.cat(kept))).cpu()
        if len(found) != len(self.members):
            raise SettingError(
                f"a row for each of {len(self.members)} examples is needed, and the criterion or divergence gives "
                f"{len(found)}"
            )
        return found

    def _masked(self, kept: Bool[Tensor, " position"]) -> Outputs:
        """What the model says with these positions of all examples alone."""
        sample = torch.ones(math.prod(self._shape))
        sample[self._gates] = kept[self._owners].to(sample)
        sample = sample.view(self._shape).to(self._value.device)
        masked = self.masking.mask(self._value, self._places, sample)
        return onward_pass(self.clean, {self.site: self.masking.replacement(masked)})


class Member(Question):
    """The question of one example on a panel.

    Args:
        panel: with the others.
        here: the positions of the whole batch.
        own: the example's rows.
        example, rows: as `Question` takes them.
    """

    def __init__(self, panel: Panel, here: Places, own: Tensor, example: int, rows: int) -> None:
        super().__init__(panel.site, example, rows)
        self.panel = panel
        self.own: list[int] = own.tolist()
        value, pattern = panel.clean.values[panel.site], panel.site.gating()
        self._width = math.prod(pattern.mask_shape(value, site=panel.site)[1:])
        self.units = units_of(pattern, pattern.shape(value, site=panel.site), here, own)
        self.whole = torch.ones(self.positions, dtype=torch.bool)

    def number(self, gate: int) -> int:
        return self.own[gate // self._width] * self._width + gate % self._width

    def measured(self, kept: Bool[Tensor, "row position"], function: Judge) -> Tensor:
        found = []
        while len(kept):
            found.append(self.panel.measured({self.example: kept}, function)[self.example])
            kept = kept[len(found[-1]) :]
        return torch.cat(found)


def _are(outputs: Outputs, others: Outputs, numbers: list[int]) -> bool:
    """Whether outputs are those of the others with these numbers."""
    return all(_close(one, other[numbers]) for one, other in zip(parameters(outputs), parameters(others), strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
