"""Analyses of explanations: what is kept per group, in how many depths, what stands out, how far seeds differ.

After De Cao et al. 2020, section 3.2 and figure 4. Padding never counts. Numpy does the work on rows; Python loops only
over groups, layers and parts. `pandas.DataFrame(...)` turns the results of these functions into a table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.grouping import Codes, Group, Grouped, grouped
from maskhooks.explanations.layers import Layers
from maskhooks.explanations.scores import FIXED, INTEGERS, Column
from maskhooks.explanations.tokens import tags_to_pieces, token_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DepthsKept",
    "Deviation",
    "Group",
    "GroupKept",
    "depths_kept",
    "kept_by",
    "plot_depths",
    "seed_deviation",
    "tags_to_pieces",
    "token_kind",
    "top_groups",
]

Floats = npt.NDArray[np.float64]
Explanations = Explanation | Iterable[Explanation]


@dataclass(frozen=True)
class GroupKept:
    """What is kept of a group at one layer: a masked site, with masks read from one depth.

    Attributes:
        site: the masked site.
        depth: the depth that was read.
        group: the group.
        score: mean P(z != 0), the expected fraction kept.
        kept: the fraction of positions with a score above the explanation's threshold.
        positions: the number of positions; if heads are gated, each head counts.
        examples: the number of examples these come from.
    """

    site: str
    depth: int
    group: str
    score: float
    kept: float
    positions: int
    examples: int


@dataclass(frozen=True)
class DepthsKept:
    """In how many depths the positions of a group are kept.

    Attributes:
        group: the group.
        depths: the mean number of depths in which a position is kept.
        standard_error: of `depths`, clustered by example because positions of one text are not independent; NaN for one
            example.
        fraction: `depths` as a fraction of all depths.
        positions: the number of positions.
        examples: the number of examples these come from.
    """

    group: str
    depths: float
    standard_error: float
    fraction: float
    positions: int
    examples: int


@dataclass(frozen=True)
class Deviation:
    """How far explanations with several seeds differ at one layer, or over all layers if site and depth are None.

    Attributes:
        site: the masked site.
        depth: the depth that was read.
        deviation: the standard deviation of P(z != 0) over seeds, averaged over positions.
        positions: the number of positions; if heads are gated, each head counts.
    """

    site: str | None
    depth: int | None
    deviation: float
    positions: int


def kept_by(explanation: Explanations, group: Group, *, min_count: int = 1) -> list[GroupKept]:
    """Return what is kept of each group at each layer, by depth, then by descending score.

    Args:
        explanation: an explanation, or an iterable of explanations of different examples, such as `Shards`; it is read
            one by one.
        group: how to group positions: a column, a function or mapping of labels, or tags; see
            `maskhooks.explanations.grouping.grouped`.
        min_count: omit groups with fewer positions at a layer.

    Raises:
        SettingError: there is no such column, the tags do not fit, or no position is in any group.
    """
    sums: dict[tuple[int, str, str], Floats] = defaultdict(lambda: np.zeros(4))
    for part in _parts(explanation):
        inside = grouped(part, group)
        layers = Layers(part.columns, part.sites)
        groups = len(inside.names)
        cells, count = layers.which[inside.rows] * groups + inside.codes, len(layers) * groups
        table = [np.bincount(cells, part[name][inside.rows], count) for name in ("score", "kept")]
        table += [np.bincount(cells, minlength=count), _distinct(cells, part["example"][inside.rows], count)]
        rows = np.stack(table, axis=1)
        for cell in np.flatnonzero(table[2]).tolist():
            layer, code = divmod(cell, groups)
            site, depth = layers.pairs[layer]
            sums[depth, site, inside.names[code]] += rows[cell]
    _check_any(sums)
    made = [
        GroupKept(site, depth, name, float(score / number), float(kept / number), int(number), int(examples))
        for (depth, site, name), (score, kept, number, examples) in sums.items()
        if number >= min_count
    ]
    return sorted(made, key=lambda row: (row.depth, row.site, -row.score, row.group))


def depths_kept(explanation: Explanations, group: Group, *, min_count: int = 1) -> list[DepthsKept]:
    """Return the mean number of depths in which each group's positions are kept (De Cao et al. 2020, figure 4).

    With k_il = 1 where position i is kept at layer l (a masked site, with masks read from one depth), a group of n
    positions has

        depths = 1/n sum_i sum_l k_il

    where k_il is a mean over heads or other extra axes. The standard error is that of a ratio over clusters (Cochran
    1977, section 2.11). The clusters are the G examples e; example e has n_e positions, kept in d_e depths in total:

        error² = G/(G-1) 1/n² sum_e (d_e - depths n_e)²

    Args:
        explanation: an explanation, or an iterable of explanations of different examples, such as `Shards`; it is read
            one by one.
        group: as in `kept_by`.
        min_count: omit groups with fewer positions.

    Returns:
        One entry for each group, most depths first.

    Raises:
        SettingError: there is no such column, the tags do not fit, or no position is in any group.
    """
    sums: dict[str, Floats] = defaultdict(lambda: np.zeros(7))
    for part in _parts(explanation):
        inside = grouped(part, group)
        for name, row in zip(inside.names, _cluster_sums(part, inside), strict=True):
            sums[name] += row
    _check_any(sums)
    made = [_depths(name, row) for name, row in sums.items() if row[0] >= min_count]
    return sorted(made, key=lambda row: (-row.depths, row.group))


def top_groups(explanation: Explanation, group: Group = "label", *, depth: int | None = None) -> dict[str, float]:
    """Return the fraction of examples in which each group has the largest score, largest fraction first.

    `top_groups(explanation).get("[CLS]", 0.0)` is how often `[CLS]` has the largest score: 99 % of the time in the last
    layer for the BERT of De Cao et al. 2020, section 3.2. Positions with equal scores, such as fully open gates, share
    their example evenly. Scores are means over heads or other extra axes, and over sites of one depth.

    Args:
        explanation: the scores.
        group: as in `kept_by`; `"position"` groups by position instead of label. Positions without a group compete too,
            but their share is not in the result.
        depth: the depth that was read; None is the highest.

    Raises:
        SettingError: there is no such depth or column, the tags do not fit, or no position is in any group.
    """
    if not isinstance(explanation, Explanation):
        raise SettingError(
            f"top_groups takes one Explanation, got {type(explanation).__name__}. "
            f"Explanation.from_parquet(folder) reads all files of a folder"
        )
    inside = grouped(explanation, group)
    depths = np.unique(explanation["depth"])
    if depth is not None and depth not in depths:
        raise SettingError(f"there is no depth {depth}. The explanation holds {', '.join(map(str, depths))}")
    _check_any(inside.rows)
    here = explanation["valid"] & (explanation["depth"] == (depths[-1] if depth is None else depth))
    codes = np.full(len(explanation), -1)
    codes[inside.rows] = inside.codes
    _, first, cells = np.unique(
        _keys(explanation, ("example", "position", "relation"))[here], return_index=True, return_inverse=True
    )
    means = np.bincount(cells, explanation["score"][here]) / np.bincount(cells)
    _, owners = np.unique(explanation["example"][here][first], return_inverse=True)
    largest = np.full(owners.max(initial=-1) + 1, -np.inf)
    np.maximum.at(largest, owners, means)
    best = means == largest[owners]
    share = best / np.bincount(owners, best)[owners]
    codes = codes[here][first]
    shares = np.bincount(codes[codes >= 0], share[codes >= 0], len(inside.names)) / len(largest)
    order = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
    return {inside.names[index]: float(shares[index]) for index in order}


def seed_deviation(explanations: Sequence[Explanation]) -> list[Deviation]:
    """Return how far explanations of the same examples with several seeds differ.

    This is the sample standard deviation of P(z != 0) over S seeds (divisor S - 1), averaged over positions (De Cao et
    al. 2020, section 3.2: .05 for inputs and .03 for hidden states, over five seeds).

    Returns:
        One entry for each layer in order of depth, then one over all layers.

    Raises:
        SettingError: fewer than two explanations, or different examples, positions, sites or depths.
    """
    found = [_in_order(explanation) for explanation in explanations]
    if len(found) < 2:
        raise SettingError(
            f"seed_deviation needs at least two explanations, got {len(found)}. Explain with several seeds"
        )
    for number, other in enumerate(found[1:], 1):
        difference = _difference(found[0], other)
        if difference:
            raise SettingError(
                f"explanations 0 and {number} differ in {difference}. Explain the same batches at the same sites with "
                f"each seed, or select what they share: explanation.select(example=..., site=..., depth=...)"
            )
    _check_any(found[0]["score"])
    deviations = np.stack([one["score"] for one in found]).astype(np.float64).std(axis=0, ddof=1)
    layers = Layers(found[0].columns, found[0].sites)
    rows = [
        Deviation(site, depth, float(deviations[layers.which == index].mean()), int((layers.which == index).sum()))
        for index, (site, depth) in enumerate(layers.pairs)
    ]
    return [*rows, Deviation(None, None, float(deviations.mean()), len(deviations))]


def plot_depths(rows: Sequence[DepthsKept], *, max_groups: int = 30, ax: Axes | None = None) -> Figure:
    """Draw a bar for each group, with standard error and number of positions (De Cao et al. 2020, figure 4).

    Args:
        rows: from `depths_kept`, drawn in this order.
        max_groups: show at most this many groups: the first and the last.
        ax: Axes to draw on; None makes a figure.
    """
    from maskhooks.viz.groups import groups

    return groups(
        [row.group for row in rows],
        [row.depths for row in rows],
        [row.standard_error for row in rows],
        [row.positions for row in rows],
        x="mean number of depths in which a position is kept",
        max_groups=max_groups,
        ax=ax,
    )


def _parts(explanation: Explanations) -> Iterable[Explanation]:
    return [explanation] if isinstance(explanation, Explanation) else explanation


def _check_any(found: Sized) -> None:
    if not len(found):
        raise SettingError(
            "no valid position is in any group. Compare the groups with what the explanation holds, such as "
            "set(explanation['label'])"
        )


def _distinct(cells: Codes, examples: Column, count: int) -> Codes:
    """The number of distinct examples in each of `count` cells."""
    number = int(examples.max(initial=0)) + 1
    return np.bincount(np.unique(cells.astype(np.int64) * number + examples) // number, minlength=count)


def _keys(explanation: Explanation, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each row; rows that agree in all these columns, if present, get the same number."""
    keys = np.zeros(len(explanation), np.int64)
    for name in names:
        if name in explanation.columns:
            column = explanation[name].astype(np.int64)
            column -= column.min(initial=0)
            keys = keys * (int(column.max(initial=0)) + 1) + column
    return keys


def _cluster_sums(part: Explanation, inside: Grouped) -> Floats:
    """`[group, 7]`: n, d, d_e², d_e n_e, n_e² summed over examples; examples; (position, layer) pairs."""
    rows = inside.rows
    example, position = part["example"][rows].astype(np.int64), _keys(part, ("position", "relation"))[rows]
    width = int(position.max(initial=0)) + 1
    clusters, cluster = np.unique(inside.codes * (example.max(initial=0) + 1) + example, return_inverse=True)
    places, place = np.unique(cluster * width + position, return_inverse=True)
    owners = clusters // (example.max(initial=0) + 1)
    weight = np.ones(len(rows))
    if set(part.columns) - set(FIXED):
        layers = Layers(part.columns, part.sites)
        _, cells, count = np.unique(place * len(layers) + layers.which[rows], return_inverse=True, return_counts=True)
        weight = 1 / count[cells]
    kept = np.bincount(cluster, weight * part["kept"][rows], len(clusters))
    number = np.bincount(places // width, minlength=len(clusters)).astype(float)
    terms = [number, kept, kept**2, kept * number, number**2, np.ones(len(clusters))]
    terms.append(np.bincount(cluster, weight, len(clusters)))
    table = np.stack([np.bincount(owners, term, len(inside.names)) for term in terms], axis=1)
    return table.astype(np.float64, copy=False)  # np.bincount of an empty array returns integers


def _depths(group: str, sums: Floats) -> DepthsKept:
    n, kept, kept2, cross, n2, examples, layers = map(float, sums)
    depths = kept / n
    spread2 = max(kept2 - 2 * depths * cross + depths**2 * n2, 0.0)
    error = math.sqrt(spread2 * examples / (examples - 1)) / n if examples > 1 else math.nan
    return DepthsKept(group, depths, error, kept / layers, int(n), int(examples))


def _in_order(explanation: Explanation) -> Explanation:
    """The valid rows, ordered by site, depth, example, position and other axes."""
    part = explanation.select()
    sites = sorted(part.sites)
    places = np.array([sites.index(site) for site in part.sites], np.int32)
    columns = {**part.columns, "site": places[part.columns["site"]]}
    order = np.lexsort([columns[name] for name in reversed([*INTEGERS, *_other_columns(part)])])
    return Explanation({name: column[order] for name, column in columns.items()}, tuple(sites))


def _other_columns(explanation: Explanation) -> list[str]:
    return sorted(set(explanation.columns) - set(FIXED))


def _difference(first: Explanation, other: Explanation) -> str:
    """The first difference, other than scores, between two ordered explanations; empty if there is none."""
    if first.sites != other.sites:
        return f"sites ({', '.join(first.sites)}; {', '.join(other.sites)})"
    if _other_columns(first) != _other_columns(other):
        return f"columns ({', '.join(_other_columns(first))}; {', '.join(_other_columns(other))})"
    for name in ("example", "depth", "position"):
        if not np.array_equal(np.unique(first[name]), np.unique(other[name])):
            return f"{name}s"
    for name in ("example", "depth", "position", "label", *_other_columns(first)):
        if not np.array_equal(first[name], other[name]):
            return f"the column {name!r}"
    return ""
