"""Layers: the rows of an explanation by masked site and depth, as the arrays that pictures take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from maskhooks.scores import FIXED, Column, Columns

Scored = npt.NDArray[np.float32]
_ALL = slice(None)


class Layers:
    """The layers of rows: pairs of masked site and depth read, in order of depth.

    Attributes:
        pairs: (site, depth) of each layer.
        which: for each row the index of its layer.
    """

    def __init__(self, columns: Columns, sites: Sequence[str]) -> None:
        number = max(len(sites), 1)
        keys, which = np.unique(columns["depth"].astype(np.int64) * number + columns["site"], return_inverse=True)
        self.columns = columns
        self.which = which
        self.pairs = [(sites[key % number], int(key // number)) for key in keys]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def labels(self) -> list[str]:
        """What the layers are called: the depth, with the site where several share a depth."""
        depths = [depth for _, depth in self.pairs]
        return [str(depth) if depths.count(depth) == 1 else f"{depth} ({site})" for site, depth in self.pairs]

    def means(self) -> Scored:
        """`[layer]`, the mean score over real positions; NaN where there is none."""
        real = self.columns["real"]
        return _means(self.columns["score"][real], self.which[real], len(self))

    def grid(self, rows: Column | slice = _ALL) -> tuple[Scored, list[str]]:
        """`[layer, position]`, the mean over further axes in some rows; NaN where there is none; labels."""
        positions, first, place = np.unique(self.columns["position"][rows], return_index=True, return_inverse=True)
        cells = self.which[rows] * len(positions) + place
        scores = _means(self.columns["score"][rows], cells, len(self) * len(positions))
        labels = [str(label) for label in self.columns["label"][rows][first]]
        return scores.reshape(len(self), len(positions)), labels

    def edges(self, rows: Column | slice = _ALL) -> tuple[Scored, Column, list[str]]:
        """`[layer, edge]`, the mean over further axes in some rows; source and target, `[2, edge]`; labels.

        Edges are told apart by their ends and relation, and by their order where several are alike, as the messages of
        one layer may be others than those of the next.
        """
        ends = np.stack([self.columns[name][rows] for name in ("source", "target", "relation") if name in self.columns])
        further = [
            column[rows]
            for name, column in self.columns.items()
            if name not in (*FIXED, "edge", "source", "target", "relation")
        ]
        again = _again(np.stack([*ends, self.which[rows], *further]))
        keys, first, place = np.unique(
            np.concatenate([ends, again[None]]), axis=1, return_index=True, return_inverse=True
        )
        cells = self.which[rows] * keys.shape[1] + place.reshape(-1)
        scores = _means(self.columns["score"][rows], cells, len(self) * keys.shape[1])
        labels = [str(label) for label in self.columns["label"][rows][first]]
        return scores.reshape(len(self), -1), keys[:2], labels

    @property
    def connected(self) -> bool:
        """Whether rows are edges."""
        return "source" in self.columns and "target" in self.columns

    def images(self) -> Scored:
        """`[layer, row, column]`, the mean over further axes of all rows, which are patches."""
        row, column = self.columns["row"], self.columns["column"]
        height, width = int(row.max()) + 1, int(column.max()) + 1
        cells = (self.which * height + row) * width + column
        return _means(self.columns["score"], cells, len(self) * height * width).reshape(-1, height, width)

    def width(self, rows: Column | slice = _ALL) -> int:
        """How many patches stand side by side; 0 where positions are no patches."""
        return int(self.columns["column"][rows].max(initial=-1)) + 1 if "column" in self.columns else 0


def _again(keys: Column) -> Column:
    """For each column of keys how many equal ones stand before it."""
    _, which = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    ordered = which.reshape(-1)[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]]
    places = np.arange(len(order))
    found = np.empty_like(places)
    found[order] = places - np.maximum.accumulate(np.where(begins, places, 0))
    return found


def _means(scores: Column, cells: Column, count: int) -> Scored:
    """The mean score of each cell, NaN where it has none."""
    total = np.bincount(cells, scores.astype(np.float64), count)
    number = np.bincount(cells, minlength=count)
    means = np.divide(total, number, out=np.full(count, np.nan), where=number > 0)
    single: Scored = means.astype(np.float32, copy=False)
    return single
