"""Scores: an explainer's scores of one site at one depth, and their conversion to rows.

A row is one gated position of one example. Columns are numpy arrays of equal length; `Explanation` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskhooks.errors import BatchError, PatternError
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site

Column = npt.NDArray[Any]
Columns = dict[str, Column]

INTEGERS = ("example", "site", "depth", "position")
FIXED = (*INTEGERS, "label", "valid", "score", "kept")
_IMAGE = (("height", "width"), ("row", "column"))  # names of the two axes of an image
_PATCH = re.compile(r"\((\d+), (\d+)\)")


@dataclass(frozen=True)
class Scores:
    """The scores of one masked site, with masks read from one depth.

    Args:
        site: the masked site; it has a pattern.
        depth: the depth of the site that was read.
        values: of masks P(z != 0); axes `site.pattern.gated`.
        valid: bool, axes `site.pattern.positions`; False at padding.
        names: for each example the names of its positions; a list may omit trailing padding.
        example_index: the example index of each row if the first axis is not the batch axis; positions count within an
            example.
        edges: additional columns with a number for each row of the first axis, such as `source` and `target`.
    """

    site: Site
    depth: int
    values: Float[Tensor, "*gated"]
    valid: Bool[Tensor, "*positions"]
    names: Sequence[Sequence[str]] | None = None
    example_index: ExampleIndex | None = None
    edges: Mapping[str, Int[Tensor, " row"]] | None = None

    @property
    def count(self) -> int:
        """The number of examples; some may have no rows."""
        return len(self.values) if self.example_index is None else self.example_index.count

    def rows(self, start_index: int | Sequence[int] = 0, threshold: float = 0.5) -> Columns:
        """Return columns with a row for each element of `values`; the column `site` is 0.

        Examples are numbered from `start_index`, or as it lists them.

        With `examples`, positions count within each example. Otherwise the first gated position axis after the batch
        gives `position`. Axes named height and width, or row and column, give `row` and `column`; `position` then
        counts in row-major order, and the default label is `(row, column)`. An axis named patch gives `row` and
        `column` too if its names are such labels; both are -1 at other positions, such as a class token. Every other
        gated axis gives a column of the same name.
        If only the batch is gated, `position` is 0.

        Raises:
            PatternError: the site has no pattern, or `values` does not fit it.
            BatchError: `valid` or `names` does not fit `values`.
        """
        pattern = self.site.gating()
        values = self.values.detach().float().cpu().numpy()
        if values.ndim != len(pattern.gated):
            raise PatternError(
                f"site {self.site}: scores have shape {list(values.shape)}, but the pattern '{pattern}' gates "
                f"({', '.join(pattern.gated)}). Give one score for each gated position.",
                site=self.site,
            )
        axes: Columns = dict(zip(pattern.gated, np.indices(values.shape, dtype=np.int32), strict=True))
        row = axes.pop(pattern.positions[0])
        example, position, extra = row, np.zeros_like(row), self._edges(row)
        if self.example_index is not None:
            example = self.example_index.index.cpu().numpy().astype(np.int32)[row]
            position = self.example_index.places().cpu().numpy().astype(np.int32)[row]
            extra |= _columns(axes, extra)
        elif axes:
            position, own = _places(pattern, axes)
            extra |= own
        valid = np.broadcast_to(self._valid(pattern, values.shape), values.shape)
        labels = self._labels(example, position, extra, named=bool(axes) or self.example_index is not None)
        if "patch" in pattern.positions and "row" not in extra:
            extra |= _of_patches(labels)
        columns: Columns = {
            "example": example + np.int32(start_index)
            if isinstance(start_index, int)
            else np.asarray(start_index, np.int32)[example],
            "site": np.zeros(values.shape, np.int32),
            "depth": np.full(values.shape, self.depth, np.int32),
            "position": position,
            "label": labels,
            "valid": valid,
            "score": values,
            "kept": (values > threshold) & valid,
            **extra,
        }
        return {name: column.reshape(-1) for name, column in columns.items()}

    def _edges(self, row: Column) -> Columns:
        """The columns of `edges`."""
        columns = {name: part.cpu().numpy().astype(np.int32) for name, part in (self.edges or {}).items()}
        lengths = {name: len(column) for name, column in columns.items() if len(column) != len(row)}
        if lengths:
            raise BatchError(
                f"site {self.site}: {len(row)} edges have scores, but their columns have lengths {lengths}. Give one "
                f"number for each edge: wrap(model, edges=lambda batch: {{'source': ..., 'target': ...}})"
            )
        return {name: column[row] for name, column in columns.items()}

    def _labels(self, example: Column, position: Column, extra: Columns, *, named: bool) -> Column:
        if self.names is None and self.edges is not None and {"source", "target"} <= self.edges.keys():
            source, target = (self.edges[end].tolist() for end in ("source", "target"))
            between = np.array([f"{u}→{v}" for u, v in zip(source, target, strict=True)], dtype=object)
            labels: Column = np.broadcast_to(between.reshape(-1, *[1] * (example.ndim - 1)), example.shape)
            return labels
        count = int(position.max(initial=-1)) + 1
        across = int(extra["column"].max(initial=-1)) + 1 if "row" in extra else 0  # "row" comes with "column"
        numbers = np.array(
            [f"({index // across}, {index % across})" if across else str(index) for index in range(count)], dtype=object
        )
        if self.names is None or not named:
            return numbers[position]
        lengths = [len(names) for names in self.names]
        batch = int(example.max(initial=-1)) + 1 if self.example_index is None else self.count
        if len(lengths) != batch or max(lengths, default=0) > count:
            raise BatchError(
                f"site {self.site}: there are names for {len(lengths)} examples with up to {max(lengths, default=0)} "
                f"positions, but scores for {batch} examples with {count} positions. Give one list of names for "
                f"each example, with at most one name for each position: wrap(model, names=lambda batch: ...)"
            )
        table = np.empty((batch, count), dtype=object)
        table[:] = numbers
        for line, names in zip(table, self.names, strict=True):
            line[: len(names)] = names
        return table[example, position]

    def _valid(self, pattern: Pattern, shape: tuple[int, ...]) -> Column:
        valid = self.valid.detach().bool().cpu().numpy()
        sizes = dict(zip(pattern.gated, shape, strict=True))
        wanted = tuple(sizes[axis] for axis in pattern.positions)
        if valid.shape != wanted:
            raise BatchError(
                f"site {self.site}: the mask of valid positions has shape {list(valid.shape)}, but the scores have "
                f"positions ({', '.join(pattern.positions)}) of shape {list(wanted)}. Give a mask that fits: "
                f"wrap(model, valid=lambda batch, site: ...)"
            )
        return valid.reshape([sizes[axis] if axis in pattern.positions else 1 for axis in pattern.gated])


def _places(pattern: Pattern, axes: Mapping[str, Column]) -> tuple[Column, Columns]:
    """The position and the columns of other axes, from the index along each gated axis except the batch."""
    rest = dict(axes)
    extra: Columns = {}
    named = next((pair for pair in _IMAGE if set(pair) <= rest.keys()), None)
    if named is not None:
        extra["row"], extra["column"] = (rest.pop(axis) for axis in named)
        position = extra["row"] * (extra["column"].max(initial=-1) + 1) + extra["column"]
    else:
        position = rest.pop(next((axis for axis in rest if axis in pattern.positions), next(iter(rest))))
    return position, extra | _columns(rest, extra)


def _of_patches(labels: Column) -> Columns:
    """Row and column from labels such as `(2, 3)`, -1 for other labels; empty if no label has this form."""
    names, which = np.unique(labels.astype(str), return_inverse=True)
    found = [_PATCH.fullmatch(name) for name in names]
    if not any(found):
        return {}
    at = np.array([[-1, -1] if match is None else [int(match[1]), int(match[2])] for match in found], np.int32)
    row, column = at[which.reshape(labels.shape)].transpose(-1, *range(labels.ndim))
    return {"row": row, "column": column}


def _columns(axes: Mapping[str, Column], taken: Mapping[str, Column]) -> Columns:
    """Gated axes as columns of the same name, unless it has another meaning."""
    names = {*FIXED, "row", "column", *taken}
    return {f"{axis}_index" if axis in names else axis: index for axis, index in axes.items()}


def stack(parts: Sequence[tuple[Columns, Sequence[str]]]) -> tuple[Columns, tuple[str, ...]]:
    """Concatenate columns, and list the sites that occur; fill an axis that a part lacks with -1.

    Args:
        parts: columns, and the sites that their column `site` indexes.
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


def repeated(columns: Columns, lengths: Sequence[int]) -> bool:
    """Whether two parts of these lengths hold the same (example, site, depth)."""
    keys = np.zeros(len(columns["score"]), np.int64)
    for name in ("example", "site", "depth"):
        keys = keys * (int(columns[name].max(initial=0)) + 1) + columns[name]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    return len(np.unique(keys)) != len(np.unique(keys * len(lengths) + owners))
