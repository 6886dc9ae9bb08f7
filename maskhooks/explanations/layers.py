"""Layers: an explanation's rows by masked site and depth, as arrays for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from maskhooks.explanations.scores import FIXED, Column, Columns

Scored = npt.NDArray[np.float32]
ALL = "all layers"
_ALL = slice(None)
_TYPES = ["source_type", "target_type"]
_ENDS = ("source", "target", "relation", *_TYPES)


class Layers:
    """The layers in the rows: pairs of masked site and depth read, in order of depth.

    Args:
        columns: the rows.
        sites: the addresses that the column `site` indexes.
        whole: whether one score stands for all layers of the model, and is read at one of them.
        joined: whether to join sites of one depth into one layer if each has its own edge types, as in a network with
            a module per edge type.

    Attributes:
        pairs: (site, depth) of each layer; the site of joined layers is empty.
        which: the layer index of each row.
    """

    def __init__(self, columns: Columns, sites: Sequence[str], whole: bool = False, joined: bool = False) -> None:
        number = max(len(sites), 1)
        keys, which = np.unique(columns["depth"].astype(np.int64) * number + columns["site"], return_inverse=True)
        self.columns, self.whole = columns, whole
        self.which = self._part = which
        self.pairs = [(sites[key % number], int(key // number)) for key in keys]
        if joined and self.connected and "relation" in columns:
            self._join()

    @classmethod
    def shown(cls, columns: Columns, sites: Sequence[str], provenance: Mapping[str, Any]) -> Layers:
        """The layers for pictures, from the rows and their provenance."""
        made = [site for site in provenance.get("sites") or () if isinstance(site, Mapping)]
        weights = bool(made) and all("weight" in site.get("tags", ()) for site in made)  # edge weights, in all layers
        return cls(columns, sites, weights or bool(provenance.get("tied")), joined=True)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def labels(self) -> list[str]:
        """The names of the layers: the depth, with the site if several share a depth."""
        if self.whole and len(self) == 1:
            return [ALL]
        depths = [depth for _, depth in self.pairs]
        return [str(depth) if depths.count(depth) == 1 else f"{depth} ({site})" for site, depth in self.pairs]

    def _join(self) -> None:
        """Join the sites of one depth into one layer if no two of them share an edge type."""
        depths = [depth for _, depth in self.pairs]
        kinds, relations = np.unique(self.columns["relation"], return_inverse=True)
        met = np.unique(self._part * len(kinds) + relations)  # the edge types of each layer
        places = np.stack([np.array(depths, np.int64)[met // len(kinds)], kinds[met % len(kinds)]])
        cells, times = np.unique(places, axis=1, return_counts=True)
        apart = set(cells[0, (times > 1) | (cells[1] < 0)].tolist())
        named = [(site if depth in apart else "", depth) for site, depth in self.pairs]
        self.pairs = list(dict.fromkeys(named))
        self.which = np.array([self.pairs.index(pair) for pair in named], np.int64)[self._part]

    def means(self) -> Scored:
        """`[layer]`, the mean score over valid positions; NaN where there is none."""
        valid = self.columns["valid"]
        return _means(self.columns["score"][valid], self.which[valid], len(self))

    def totals(self, rows: Column | slice = _ALL) -> npt.NDArray[np.float64]:
        """`[layer]`, the sum of scores over some rows, such as the valid ones of an example."""
        sums = np.bincount(self.which[rows], self.columns["score"][rows], len(self))
        return sums.astype(np.float64, copy=False)  # np.bincount of an empty array returns integers

    def grid(self, rows: Column | slice = _ALL) -> tuple[Scored, list[str]]:
        """`[layer, position]`, the mean over other axes in some rows, NaN where there is none; and labels.

        Patches come first, as in `images`, then other positions, such as a class token. Layers with different
        position labels, such as an encoder's and a decoder's, have separate positions.
        """
        chosen = np.arange(len(self.which))[rows]
        patches = self._patches(chosen)
        parts = [self._line(chosen[~patches])]
        if patches.any():
            images = self.images(chosen[patches])
            parts.insert(0, (images.reshape(len(self), -1), self._places(chosen[patches], *images.shape[1:])))
        return np.concatenate([scores for scores, _ in parts], axis=1), [name for _, names in parts for name in names]

    def edges(self, rows: Column | slice = _ALL) -> tuple[Scored, Column, Column, list[str]]:
        """`[layer, edge]`, the mean over other axes in some rows; source and target, `[2, edge]`; their node types, 0
        if there is only one; and labels.

        Edges are identified by their ends and relation, and parallel edges also by their order, because the messages
        of one layer may differ from those of the next.
        """
        known = [name for name in _ENDS if name in self.columns]
        ends = np.stack([self.columns[name][rows] for name in known])
        others = [column[rows] for name, column in self.columns.items() if name not in (*FIXED, "edge", *_ENDS)]
        repeats = _repeats(np.stack([*ends, self.which[rows], *others]))
        keys, first, place = np.unique(
            np.concatenate([ends, repeats[None]]), axis=1, return_index=True, return_inverse=True
        )
        cells = self.which[rows] * keys.shape[1] + place.reshape(-1)
        scores = _means(self.columns["score"][rows], cells, len(self) * keys.shape[1])
        labels = [str(label) for label in self.columns["label"][rows][first]]
        kinds = keys[[known.index(name) for name in _TYPES]] if known[-2:] == _TYPES else np.zeros_like(keys[:2])
        return scores.reshape(len(self), -1), keys[:2], kinds, labels

    @property
    def connected(self) -> bool:
        """Whether the rows are edges."""
        return "source" in self.columns and "target" in self.columns

    @property
    def other_axes(self) -> list[str]:
        """The gated axes other than positions, such as heads; pictures show the mean over them."""
        known = (*FIXED, "row", "column", "edge", *_ENDS)
        return [name for name in self.columns if name not in known]

    def images(self, rows: Column | slice = _ALL) -> Scored:
        """`[layer, row, column]`, the mean over other axes in those of some rows that are patches.

        A layer with fewer patches than the finest repeats each score over the area its patch covers.
        """
        chosen = np.arange(len(self.which))[rows]
        chosen = chosen[self._patches(chosen)]
        which, row, column = (part[chosen] for part in (self.which, self.columns["row"], self.columns["column"]))
        height, width = int(row.max()) + 1, int(column.max()) + 1
        cells = (which * height + row) * width + column
        found = _means(self.columns["score"][chosen], cells, len(self) * height * width).reshape(-1, height, width)
        for layer in np.unique(which):
            high, wide = int(row[which == layer].max()) + 1, int(column[which == layer].max()) + 1
            down, across = np.arange(height) * high // height, np.arange(width) * wide // width
            found[layer] = found[layer][down][:, across]
        return found

    def width(self, rows: Column | slice = _ALL) -> int:
        """The number of patches in an image row; 0 if positions are not patches."""
        return int(self.columns["column"][rows].max(initial=-1)) + 1 if "column" in self.columns else 0

    def _patches(self, rows: Column) -> Column:
        """Which of these rows are patches."""
        return self.columns["row"][rows] >= 0 if "row" in self.columns else np.zeros(len(rows), bool)

    def _places(self, rows: Column, height: int, width: int) -> list[str]:
        """The names of the patches, row by row, from a layer that has them all."""
        names = {(row, column): f"({row}, {column})" for row in range(height) for column in range(width)}
        for layer in np.unique(self.which[rows]):
            own = rows[self.which[rows] == layer]
            at = list(zip(self.columns["row"][own].tolist(), self.columns["column"][own].tolist(), strict=True))
            if max(at) == (height - 1, width - 1):
                names.update(zip(at, map(str, self.columns["label"][own]), strict=True))
                break
        return list(names.values())

    def _line(self, rows: Column) -> tuple[Scored, list[str]]:
        """`[layer, position]` and labels of rows that are not patches."""
        position = self.columns["position"][rows].astype(np.int64)
        places = self._axis(rows) * (int(position.max(initial=0)) + 1) + position
        known, first, place = np.unique(places, return_index=True, return_inverse=True)
        cells = self.which[rows] * len(known) + place
        scores = _means(self.columns["score"][rows], cells, len(self) * len(known))
        return scores.reshape(len(self), -1), [str(label) for label in self.columns["label"][rows][first]]

    def _axis(self, rows: Column) -> Column:
        """A number for each row, shared by sites with the same position labels (and relations, for edges)."""
        found = np.zeros(len(rows), np.int64)
        axes: list[dict[int, tuple[str, int]]] = []
        part, position, label = self._part[rows], self.columns["position"][rows], self.columns["label"][rows]
        kind = self.columns["relation"][rows] if "relation" in self.columns else np.zeros(len(rows), int)
        for site in np.unique(part):
            own = np.flatnonzero(part == site)
            called = zip(label[own], kind[own].tolist(), strict=True)
            names = dict(zip(position[own].tolist(), called, strict=True))
            number = next((n for n, axis in enumerate(axes) if all(axis.get(p, x) == x for p, x in names.items())), -1)
            if number < 0:
                number = len(axes)
                axes.append({})
            axes[number].update(names)
            found[own] = number
        return found


def _repeats(keys: Column) -> Column:
    """For each column of keys, the number of equal columns before it."""
    _, which = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    ordered = which.reshape(-1)[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]]
    places = np.arange(len(order))
    found = np.empty_like(places)
    found[order] = places - np.maximum.accumulate(np.where(begins, places, 0))
    return found


def _means(scores: Column, cells: Column, count: int) -> Scored:
    """The mean score of each cell; NaN if it is empty."""
    total = np.bincount(cells, scores.astype(np.float64), count)
    number = np.bincount(cells, minlength=count)
    means = np.divide(total, number, out=np.full(count, np.nan), where=number > 0)
    single: Scored = means.astype(np.float32, copy=False)
    return single
