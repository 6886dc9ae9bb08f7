"""Panel: the examples of a batch of which each has rows of its own; one pass tries a set of rows of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from maskhooks.baselines import Baseline
from maskhooks.errors import SettingError
from maskhooks.hooked import Hooked
from maskhooks.masking import Places
from maskhooks.outputs import Outputs
from maskhooks.search.asking import Asking, abreast
from maskhooks.search.question import Criterion, Question, masking_of, units_of
from maskhooks.site import Site
from maskhooks.step import Clean, onward_pass, places

T = TypeVar("T")


class Panel:
    """Questions about all examples of a batch, such as the edges of its graphs, which are answered together.

    Args:
        hooked: the wrapped model.
        clean: the clean pass of the batch, which has read the site.
        site: what is closed row by row; its first axis are rows, several to an example.
        baseline: what a closed row gets.
        criterion, rows: as `Question` takes them.

    Attributes:
        members: the questions, one for each example.
    """

    def __init__(
        self,
        hooked: Hooked,
        clean: Clean,
        site: Site,
        baseline: Baseline,
        criterion: Criterion,
        *,
        rows: int = 64,
    ) -> None:
        self.hooked, self.clean, self.site = hooked, clean, site
        self.masking = masking_of(clean, site, baseline)
        self._value = clean.values[str(site)]
        self._shape = site.gating().mask_shape(self._value, site=site)
        here = places(hooked, clean, site)
        assert here.examples is not None
        self._real = here.real
        index = here.examples.index.cpu()
        parts = index.argsort(stable=True).split(torch.bincount(index, minlength=here.examples.count).tolist())
        self.members = [Member(self, here, part, example, criterion, rows) for example, part in enumerate(parts)]
        owners, first = torch.full((math.prod(self._shape),), -1), 0
        for one in self.members:
            one.write(torch.arange(first, first + one.positions), owners)
            first += one.positions
        self._gates = (owners >= 0).nonzero()[:, 0]
        self._owners = owners[self._gates]  # of each gate, its position among those of all examples

    def answer(self, askings: Sequence[Asking[T]], function: Criterion) -> list[T]:
        """What each example's asking finds out."""
        return abreast(askings, lambda sets: self.measured(sets, function))

    @torch.no_grad()
    def measured(self, sets: Mapping[int, Bool[Tensor, "set position"]], function: Criterion) -> Mapping[int, Tensor]:
        """A function of what the model says of examples as they are and with the first of their sets alone.

        Args:
            sets: of some of the examples, by their numbers; the others keep all their rows.
        """
        kept = [sets[one.example][0] if one.example in sets else one.whole for one in self.members]
        found = function(self.clean.outputs, self._masked(torch.cat(kept))).cpu()
        if len(found) != len(self.members):
            raise SettingError(
                f"a row for each of {len(self.members)} examples is needed, and the criterion or divergence gives "
                f"{len(found)}"
            )
        return {number: found[number : number + 1] for number in sets}

    def _masked(self, kept: Bool[Tensor, " position"]) -> Outputs:
        """What the model says with these positions of all examples alone."""
        sample = torch.ones(math.prod(self._shape))
        sample[self._gates] = kept[self._owners].to(sample)
        sample = sample.view(self._shape).to(self._value.device)
        masked = self.masking.mask(self._value, self._real, sample)
        return onward_pass(self.hooked, self.clean, self.site, self.masking.onto(masked))


class Member(Question):
    """The question of one example on a panel.

    Args:
        panel: with the others.
        here: the positions of the whole batch.
        own: the example's rows.
        example, criterion, rows: as `Question` takes them.
    """

    def __init__(self, panel: Panel, here: Places, own: Tensor, example: int, criterion: Criterion, rows: int) -> None:
        super().__init__(panel.site, example, criterion, rows)
        self.panel = panel
        self._own: list[int] = own.tolist()
        value, pattern = panel.clean.values[str(panel.site)], panel.site.gating()
        self._width = math.prod(pattern.mask_shape(value, site=panel.site)[1:])
        self.units = units_of(pattern, pattern.shape(value, site=panel.site), here, own)
        self.whole = torch.ones(self.positions, dtype=torch.bool)

    def number(self, gate: int) -> int:
        return self._own[gate // self._width] * self._width + gate % self._width

    def measured(self, kept: Bool[Tensor, "row position"], function: Criterion) -> Tensor:
        found = [self.panel.measured({self.example: one}, function)[self.example] for one in kept.split(1)]
        return torch.cat(found)
