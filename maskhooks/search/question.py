"""Question: which positions of one example may be closed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from maskhooks.errors import MaskhooksError, SettingError
from maskhooks.masks.baselines import Baseline
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.model.outputs import Outputs
from maskhooks.passes.clean import Clean
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.places import Places
from maskhooks.sites.site import Site

# Of the original and the masked outputs: a row for each set of positions.
Judge = Callable[[Outputs, Outputs], Tensor]

# What a model raises that does not take what a search made for it, such as a batch of some examples. Other errors, such
# as AttributeError and TypeError, are mistakes in code, and go through.
REFUSALS = (MaskhooksError, RuntimeError, ValueError, LookupError, AssertionError)


class Question(ABC):
    """What the model says of one example when only some of its real positions at a site are kept.

    Args:
        site: what is closed position by position.
        example: the number in the batch.
        rows: sets of positions in one pass.

    Attributes:
        units: what is closed as one: lists of the example's real gates, numbered through all of them, in order.
    """

    units: list[list[int]]

    def __init__(self, site: Site, example: int, rows: int) -> None:
        self.site, self.example, self.rows = site, example, rows

    @property
    def positions(self) -> int:
        """How many positions can be closed."""
        return len(self.units)

    @abstractmethod
    def measured(self, kept: Bool[Tensor, "row position"], function: Judge) -> Tensor:
        """A function of what the model says of the example as it is and with these positions alone, row by row."""

    @abstractmethod
    def number(self, gate: int) -> int:
        """A gate of this example as a number through those of the whole batch."""

    def write(self, numbers: Shaped[Tensor, " position"], gates: Shaped[Tensor, " gate"]) -> None:
        """Writes a number for each position to its gates among those of the whole batch."""
        into = [(self.number(gate), at) for at, unit in enumerate(self.units) for gate in unit]
        places, owners = torch.tensor(into, dtype=torch.long).reshape(-1, 2).unbind(1)
        gates[places] = numbers[owners].to(gates)

    def forget(self) -> None:  # noqa: B027 # few keep any
        """Lets go of clean passes."""


def masking_of(clean: Clean, site: Site, baseline: Baseline) -> Masking:
    """What closes positions of a site.

    Raises:
        SettingError: its first axis is neither the batch nor rows of examples.
    """
    pattern = site.gating()
    if pattern.axes[0] != pattern.gated[:1]:
        raise SettingError(
            f"a search needs examples along the first axis, and the pattern of {site} is '{pattern}': search at a "
            "site whose first axis is the batch"
        )
    masking = Masking(site, site.depth or 0, [], HardConcrete(), baseline)
    masking.start(masking.sizes_for(clean.values), clean.values[site].device)
    return masking


def units_of(pattern: Pattern, sizes: Mapping[str, int], here: Places, rows: Int[Tensor, " row"]) -> list[list[int]]:
    """The gates of an example that are closed together, as in `Question`.

    Args:
        sizes: of the site's axes.
        here: the positions of the whole batch.
        rows: those of the first axis that are the example's: its number in the batch, or several.
    """
    axes = (*pattern.positions, *pattern.groups)
    shape = [len(rows), *(sizes[axis] for axis in axes[1:])]
    groups = math.prod(sizes[axis] for axis in pattern.groups)
    count = math.prod(shape) // groups
    owners = torch.arange(count)
    if here.units is not None:
        owners = here.units.first.reshape(here.units.shape)[rows].cpu().flatten()
    keys = owners[:, None] * groups + torch.arange(groups)
    valid = here.valid[rows].cpu().reshape(count, 1).expand(-1, groups)
    order = [axes.index(axis) for axis in pattern.gated]
    keys, valid = (part.reshape(shape).permute(order).reshape(-1) for part in (keys, valid))
    found: dict[int, list[int]] = {}
    for gate, (key, there) in enumerate(zip(keys.tolist(), valid.tolist(), strict=True)):
        if there:
            found.setdefault(key, []).append(gate)
    return list(found.values())
