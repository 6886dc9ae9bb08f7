"""Question: which positions of one example may be closed, asked of the model for many sets of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from maskhooks.baselines import Baseline
from maskhooks.errors import BatchError, SettingError
from maskhooks.gates import HardConcrete
from maskhooks.hooked import Hooked
from maskhooks.masking import Masking
from maskhooks.outputs import Outputs
from maskhooks.preparation import sizes, start
from maskhooks.replay import Replay
from maskhooks.site import Site
from maskhooks.step import Clean, clean_pass, onward_pass, places, real_positions

Criterion = Callable[[Outputs, Outputs], Tensor]


@dataclass(frozen=True)
class Repeated:
    """An example by itself, as often as a pass has rows.

    Attributes:
        clean: a clean pass of it.
        real: which positions are real.
        units: as `Question.units`, in this pass, where there may be less padding.
    """

    clean: Clean
    real: Tensor
    units: list[list[int]]


class Question:
    """What the model says of one example when only some of its real positions at a site are kept.

    Args:
        hooked: the wrapped model.
        clean: the clean pass of the batch, which has read the site.
        site: what is closed position by position; its first axis is the batch.
        example: the number in the batch.
        baseline: what a closed position gets.
        criterion: `(original, masked) -> row`, bool, or a number that is at least 1 where the prediction is unchanged.
        rows: sets of positions in one pass.
        replay: where the model runs from the site onward only.

    Attributes:
        units: what is closed as one: lists of the example's real gates, numbered through all of them, in order.
    """

    def __init__(
        self,
        hooked: Hooked,
        clean: Clean,
        site: Site,
        example: int,
        baseline: Baseline,
        criterion: Criterion,
        *,
        rows: int = 64,
        replay: Replay | None = None,
    ) -> None:
        self.hooked, self.clean, self.site, self.example = hooked, clean, site, example
        self.criterion, self.rows, self.replay = criterion, rows, replay
        self.masking = Masking(site, site.depth or 0, [], HardConcrete(), baseline)
        value = clean.values[str(site)]
        start(self.masking, sizes(self.masking, clean), value.device)
        pattern = site.gating()
        if pattern.axes[0] != pattern.gated[:1]:
            raise SettingError(
                f"a search needs examples along the first axis, and the pattern of {site} is '{pattern}': search at a "
                "site whose first axis is the batch"
            )
        if places(hooked, clean, site).examples is not None:
            raise SettingError(
                f"a search closes positions of one example at a time, and the rows of {site} belong to graphs, several "
                "to each: masks with free gates are there for these, as DiffMask(hooked, ..., amortized=False)"
            )
        self.count = len(value)
        self._real = real_positions(hooked, clean, site)
        self.units = _units(self.masking, clean, hooked, example)
        self._repeated: Repeated | None = None

    @property
    def positions(self) -> int:
        """How many positions can be closed."""
        return len(self.units)

    def forget(self) -> None:
        """Lets go of clean passes."""
        self._repeated = None

    def repeated(self, rows: int) -> Repeated:
        """The example by itself, as often as this.

        Raises:
            BatchError: the batch does not say how to take one example out of it.
        """
        batch = self.hooked.task.select(self.clean.batch, [self.example] * rows, self.count)
        clean = clean_pass(self.hooked, batch, [self.site], [self.site], self.replay)
        found = Repeated(
            clean, real_positions(self.hooked, clean, self.site), _units(self.masking, clean, self.hooked, 0)
        )
        here, there = self._values(clean, found.real, -1), self._values(self.clean, self._real, self.example)
        same = len(found.real) == rows and [len(unit) for unit in found.units] == [len(unit) for unit in self.units]
        if not same or here.shape != there.shape or not torch.allclose(here, there, rtol=0.01, atol=0.001):
            raise BatchError(
                f"example {self.example} taken out of the batch gives another value at {self.site} than within it: "
                "say how to take examples out, with wrap(model, select=lambda batch, numbers: ...)"
            )
        return found

    @torch.no_grad()
    def measured(self, kept: Bool[Tensor, "row position"], function: Criterion) -> Tensor:
        """A function of what the model says of the example as it is and with these positions alone, row by row."""
        width = min(self.rows, len(kept))
        if self._repeated is None or len(self._repeated.real) != width:
            self._repeated = self.repeated(width)
        found = []
        for part in kept.split(width):
            filled = torch.cat([part, part[:1].expand(width - len(part), -1)])
            outputs = function(self._repeated.clean.outputs, self.masked(self._repeated, filled))
            found.append(outputs[: len(part)].cpu())
        return torch.cat(found)

    def masked(self, repeated: Repeated, kept: Bool[Tensor, "row position"]) -> Outputs:
        """What the model says of the repeated example with these positions alone."""
        value = repeated.clean.values[str(self.site)]
        shape = self.site.gating().mask_shape(value, site=self.site)
        sample = value.new_ones(len(kept), math.prod(shape[1:]), dtype=torch.float32)
        for number, unit in enumerate(repeated.units):
            sample[:, unit] = kept[:, number, None].to(sample)
        masked = self.masking.mask(value, repeated.real, sample.reshape(shape))
        return onward_pass(self.hooked, repeated.clean, self.site, self.masking.onto(masked))

    def _values(self, clean: Clean, real: Tensor, example: int) -> Tensor:
        """The values at an example's real positions, `position feature`."""
        value = clean.values[str(self.site)]
        return self.site.gating().rows(value, site=self.site)[example][real[example]].float()

    def keeps(self, kept: Bool[Tensor, "row position"]) -> Bool[Tensor, " row"]:
        """Whether the prediction is unchanged with these positions alone."""
        return self.measured(kept, self.unchanged)

    def unchanged(self, original: Outputs, masked: Outputs) -> Bool[Tensor, " row"]:
        """The criterion as bool.

        Raises:
            SettingError: it says something else than a truth value for each row.
        """
        found = self.criterion(original, masked)
        if not isinstance(found, Tensor) or found.dim() != 1:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise SettingError(
                f"a criterion gives a tensor with a truth value for each row, got {got}: "
                "lambda original, masked: masked.probs[:, 0] > 0.5"
            )
        return found >= 1


def _units(masking: Masking, clean: Clean, hooked: Hooked, example: int) -> list[list[int]]:
    """The gates of an example that are closed together."""
    here = places(hooked, clean, masking.site)
    pattern = masking.site.gating()
    sizes = pattern.shape(clean.values[str(masking.site)])
    axes = (*pattern.positions[1:], *pattern.groups)
    shape = [sizes[axis] for axis in axes]
    groups = math.prod(sizes[axis] for axis in pattern.groups)
    count = math.prod(shape) // groups
    owners = torch.arange(count) if here.units is None else here.units.first[example].cpu()
    keys = owners[:, None] * groups + torch.arange(groups)
    real = here.real[example].cpu().reshape(count, 1).expand(-1, groups)
    order = [axes.index(axis) for axis in pattern.gated[1:]]
    keys, real = (part.reshape(shape).permute(order).reshape(-1) for part in (keys, real))
    found: dict[int, list[int]] = {}
    for gate, (key, there) in enumerate(zip(keys.tolist(), real.tolist(), strict=True)):
        if there:
            found.setdefault(key, []).append(gate)
    return list(found.values())
