"""Repeated: a question about one example, answered with a batch of its copies, one per set of positions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskhooks.errors import BatchError, MaskhooksError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import Baseline
from maskhooks.model.outputs import Outputs
from maskhooks.passes.clean import Clean, clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.search.question import Criterion, Question, masking_of, units_of
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site

_OF_SIZES = re.compile("size|shape|dimension")  # in an error: the model takes batches of one size


@dataclass(frozen=True)
class Copies:
    """A batch of copies of one example.

    Attributes:
        clean: the clean pass of the copies.
        places: the positions of the copies.
        units: as `Question.units`, for this batch, which may have less padding.
    """

    clean: Clean
    places: Places
    units: list[list[int]]


class Repeated(Question):
    """A question about one example, answered with a batch of its copies.

    Args:
        clean: the clean pass of the batch, which has read the site.
        site, example, rows: as in `Question`; the site's first axis is the batch axis.
        baseline: what replaces a closed position.
        replay: if given, the model runs only from the site onward.
    """

    def __init__(
        self,
        clean: Clean,
        site: Site,
        example: int,
        baseline: Baseline,
        *,
        rows: int = 64,
        replay: Replay | None = None,
    ) -> None:
        super().__init__(site, example, rows)
        self.hooked, self.clean, self.replay = clean.hooked, clean, replay
        self.masking = masking_of(clean, site, baseline)
        value = clean.values[site]
        self.count = len(value)
        self._width = math.prod(site.gating().mask_shape(value, site=site)[1:])
        self.units = self._units(clean, example)
        self._copies: Copies | None = None

    def forget(self) -> None:
        self._copies = None

    def number(self, gate: int) -> int:
        return self.example * self._width + gate

    def copies(self, rows: int) -> Copies:
        """Return this many copies of the example.

        Raises:
            BatchError: the example has other values alone than in its batch, or the model fails on copies of it.
        """
        batch = self.hooked.task.select(self.clean.batch, [self.example] * rows, self.count)
        try:
            clean = clean_pass(self.hooked, batch, [self.site], [self.site], self.replay)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, MaskhooksError) or not _OF_SIZES.search(str(error)):
                raise
            raise BatchError(
                f"the model ran a batch of {self.count} examples, but fails on one of {rows}, copies of example "
                f"{self.example} ({type(error).__name__}: {error}). Let it take batches of any size, with states made "
                "for the batch that it gets; or say how to select examples: "
                "wrap(model, select=lambda batch, numbers: ...)"
            ) from error
        found = Copies(clean, Places(clean.places[self.site].valid), self._units(clean, 0))
        here, there = self._values(clean, -1), self._values(self.clean, self.example)
        same = len(found.places.valid) == rows and [len(unit) for unit in found.units] == [
            len(unit) for unit in self.units
        ]
        if not same or here.shape != there.shape or not torch.allclose(here, there, rtol=0.01, atol=0.001):
            raise BatchError(
                f"example {self.example} has other values at {self.site} alone than in its batch. Say how to select "
                "examples: wrap(model, select=lambda batch, numbers: ...)"
            )
        return found

    @torch.no_grad()
    def measured(self, kept: Bool[Tensor, "row position"], function: Criterion) -> Tensor:
        width = min(self.rows, len(kept))
        if self._copies is None or len(self._copies.places.valid) != width:
            self._copies = self.copies(width)
        found = []
        for part in kept.split(width):
            filled = torch.cat([part, part[:1].expand(width - len(part), -1)])
            outputs = function(self._copies.clean.outputs, self.masked(self._copies, filled))
            found.append(outputs[: len(part)].cpu())
        return torch.cat(found)

    def masked(self, copies: Copies, kept: Bool[Tensor, "row position"]) -> Outputs:
        """Return the outputs for the copies, with only these positions kept."""
        value = copies.clean.values[self.site]
        shape = self.site.gating().mask_shape(value, site=self.site)
        sample = value.new_ones(len(kept), math.prod(shape[1:]), dtype=torch.float32)
        for number, unit in enumerate(copies.units):
            sample[:, unit] = kept[:, number, None].to(sample)
        masked = self.masking.mask(value, copies.places, sample.reshape(shape))
        return onward_pass(copies.clean, {self.site: self.masking.replacement(masked)})

    def _units(self, clean: Clean, example: int) -> list[list[int]]:
        pattern = self.site.gating()
        sizes = pattern.shape(clean.values[self.site], site=self.site)
        return units_of(pattern, sizes, clean.places[self.site], torch.tensor([example]))

    def _values(self, clean: Clean, example: int) -> Float[Tensor, "position feature"]:
        """Return the values at an example's valid positions."""
        rows = self.site.gating().rows(clean.values[self.site], site=self.site)
        return rows[example][clean.places[self.site].valid[example]].float()
