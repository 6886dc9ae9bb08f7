"""Question: which positions of one example can be closed."""

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

# Maps the original and the masked outputs to a row per set of positions.
Criterion = Callable[[Outputs, Outputs], Tensor]

# What a model may raise on a batch that a search made, such as one of selected examples. Other errors, such as
# AttributeError and TypeError, are bugs, and propagate.
REFUSALS = (MaskhooksError, RuntimeError, ValueError, LookupError, AssertionError)


class Question(ABC):
    """What the model predicts for one example when only some of its valid positions at a site are kept.

    Args:
        site: the site whose positions are closed.
        example: the example's index in the batch.
        rows: sets of positions in one pass.

    Attributes:
        units: which gates are closed together: lists of the example's valid gates as flat indices, in order.
    """

    units: list[list[int]]

    def __init__(self, site: Site, example: int, rows: int) -> None:
        self.site, self.example, self.rows = site, example, rows

    @property
    def positions(self) -> int:
        """How many positions can be closed."""
        return len(self.units)

    @abstractmethod
    def measured(self, kept: Bool[Tensor, "row position"], function: Criterion) -> Tensor:
        """Apply a function to the original outputs and those with only these positions kept, row by row."""

    @abstractmethod
    def number(self, gate: int) -> int:
        """Return the index of this example's gate among those of the whole batch."""

    def write(self, numbers: Shaped[Tensor, " position"], gates: Shaped[Tensor, " gate"]) -> None:
        """Write a number per position to its gates among those of the whole batch."""
        into = [(self.number(gate), at) for at, unit in enumerate(self.units) for gate in unit]
        places, owners = torch.tensor(into, dtype=torch.long).reshape(-1, 2).unbind(1)
        gates[places] = numbers[owners].to(gates)

    def forget(self) -> None:  # noqa: B027 # most keep none
        """Release clean passes."""


def masking_of(clean: Clean, site: Site, baseline: Baseline) -> Masking:
    """Return the masking that closes positions of a site.

    Raises:
        SettingError: the first axis is neither the batch axis nor rows of examples.
    """
    pattern = site.gating()
    if pattern.axes[0] != pattern.gated[:1]:
        raise SettingError(
            f"a search needs examples along the first axis, but the pattern of {site} is '{pattern}'. Search at a "
            "site with the batch axis first"
        )
    masking = Masking(site, site.depth or 0, [], HardConcrete(), baseline)
    masking.start(masking.sizes_for(clean.values), clean.values[site].device)
    return masking


def units_of(pattern: Pattern, sizes: Mapping[str, int], here: Places, rows: Int[Tensor, " row"]) -> list[list[int]]:
    """Return the gates of an example that are closed together, as in `Question`.

    Args:
        sizes: the sizes of the site's axes.
        here: the positions of the whole batch.
        rows: the example's rows along the first axis: its index in the batch, or several.
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
