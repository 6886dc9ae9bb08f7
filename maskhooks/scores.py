"""Scores: what an explainer found out about one site at one depth, and how that becomes rows.

A row is one gated position of one example. Columns are numpy arrays of equal length; `Explanation` says
which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float
from torch import Tensor

from maskhooks.errors import BatchError, PatternError
from maskhooks.pattern import Pattern
from maskhooks.site import Site

Column = npt.NDArray[Any]
Columns = dict[str, Column]

INTEGERS = ("example", "site", "depth", "position")
FIXED = (*INTEGERS, "label", "real", "score", "kept")


@dataclass(frozen=True)
class Scores:
    """The scores of one masked site, as read from one depth.

    Args:
        site: the masked site; it has a pattern.
        depth: the place of the site that was read.
        values: P(z != 0) in [0, 1], axes `site.pattern.gated`.
        real: bool, axes `site.pattern.positions`; False at padding.
        names: for each example what its positions are called; a list may end before the padding begins.
    """

    site: Site
    depth: int
    values: Float[Tensor, "*gated"]
    real: Bool[Tensor, "*positions"]
    names: Sequence[Sequence[str]] | None = None

    def rows(self, first: int | Sequence[int] = 0, threshold: float = 0.5) -> Columns:
        """Columns with a row for each element of `values`; the column `site` is 0.

        The examples are numbered from `first` on, or as it lists them.

        The first gated position axis after the batch gives `position`. Axes named height and width give `row`
        and `column`, and `position` counts through both. Any other gated axis gives a column of its own name.
        Where only the batch is gated, `position` is 0.

        Raises:
            PatternError: the site has no pattern, or `values` does not fit it.
            BatchError: `real` or `names` does not fit `values`.
        """
        pattern = self.site.gating()
        values = self.values.detach().float().cpu().numpy()
        if values.ndim != len(pattern.gated):
            raise PatternError(
                f"site {self.site}: scores have shape {list(values.shape)}, the pattern '{pattern}' gates "
                f"({', '.join(pattern.gated)}). Give one score for each gated position.",
                site=self.site,
            )
        axes: Columns = dict(zip(pattern.gated, np.indices(values.shape, dtype=np.int32), strict=True))
        example = axes.pop(pattern.positions[0])
        position, further = _places(pattern, axes) if axes else (np.zeros_like(example), {})
        real = np.broadcast_to(self._real(pattern, values.shape), values.shape)
        columns: Columns = {
            "example": example + np.int32(first) if isinstance(first, int) else np.asarray(first, np.int32)[example],
            "site": np.zeros(values.shape, np.int32),
            "depth": np.full(values.shape, self.depth, np.int32),
            "position": position,
            "label": self._labels(example, position, named=bool(axes)),
            "real": real,
            "score": values,
            "kept": (values > threshold) & real,
            **further,
        }
        return {name: column.reshape(-1) for name, column in columns.items()}

    def _labels(self, example: Column, position: Column, *, named: bool) -> Column:
        count = int(position.max(initial=-1)) + 1
        numbers = np.array([str(index) for index in range(count)], dtype=object)
        if self.names is None or not named:
            return numbers[position]
        lengths = [len(names) for names in self.names]
        batch = int(example.max(initial=-1)) + 1
        if len(lengths) != batch or max(lengths, default=0) > count:
            raise BatchError(
                f"site {self.site}: names for {len(lengths)} examples with up to {max(lengths, default=0)} "
                f"positions, scores for {batch} examples with {count} positions. Give one list of names for "
                f"each example, with at most one name for each position: wrap(model, names=lambda batch: ...)"
            )
        table = np.empty((batch, count), dtype=object)
        table[:] = numbers
        for line, names in zip(table, self.names, strict=True):
            line[: len(names)] = names
        return table[example, position]

    def _real(self, pattern: Pattern, shape: tuple[int, ...]) -> Column:
        real = self.real.detach().bool().cpu().numpy()
        sizes = dict(zip(pattern.gated, shape, strict=True))
        wanted = tuple(sizes[axis] for axis in pattern.positions)
        if real.shape != wanted:
            raise BatchError(
                f"site {self.site}: the mask of real positions has shape {list(real.shape)}, the scores have "
                f"positions ({', '.join(pattern.positions)}) of shape {list(wanted)}. Give one that fits: "
                f"wrap(model, real=lambda batch, site: ...)"
            )
        return real.reshape([sizes[axis] if axis in pattern.positions else 1 for axis in pattern.gated])


def _places(pattern: Pattern, axes: Mapping[str, Column]) -> tuple[Column, Columns]:
    """The position, and the columns of further axes, from the index along each gated axis but the batch."""
    rest = dict(axes)
    further: Columns = {}
    if "height" in rest and "width" in rest:
        further["row"], further["column"] = rest.pop("height"), rest.pop("width")
        position = further["row"] * (further["column"].max(initial=-1) + 1) + further["column"]
    else:
        position = rest.pop(next((axis for axis in rest if axis in pattern.positions), next(iter(rest))))
    taken = {*FIXED, *further}
    further.update({f"{axis}_index" if axis in taken else axis: index for axis, index in rest.items()})
    return position, further


def stack(parts: Sequence[tuple[Columns, Sequence[str]]]) -> tuple[Columns, tuple[str, ...]]:
    """Columns below each other, and one list of the sites that occur; -1 where a part lacks another's axis.

    Args:
        parts: columns, and the sites that their column `site` counts.
    """
    here = [[sites[index] for index in np.unique(columns["site"])] for columns, sites in parts]
    sites = tuple(dict.fromkeys(site for part in here for site in part))
    names = dict.fromkeys(name for columns, _ in parts for name in columns)
    stacked = {
        name: np.concatenate([columns.get(name, np.full(len(columns["score"]), -1, np.int32)) for columns, _ in parts])
        for name in names
    }
    numbers = [np.array([sites.index(site) if site in sites else -1 for site in old], np.int32) for _, old in parts]
    stacked["site"] = np.concatenate(
        [number[columns["site"]] for number, (columns, _) in zip(numbers, parts, strict=True)]
    )
    return stacked, sites
