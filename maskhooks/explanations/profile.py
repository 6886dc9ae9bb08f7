"""The profile of an explanation: how much each layer has in all, and how much of it is lost before the next.

For scores that add up over positions: bits of information bottlenecks, or the number of positions that masks keep. A
layer and the next are neighbours by depth, so the profile speaks of layers in a row, not of an encoder and a decoder.
Bits are upper bounds, each measured at its own layer at a price; a layer may have more of them than the one before.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskhooks.errors import SettingError
from maskhooks.explanations.analyses import Explanations
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.layers import Layers
from maskhooks.explanations.score_labels import BITS, LOST, common_label, score_label, unit
from maskhooks.viz.amount import amount
from maskhooks.viz.sections import Bar, Bars, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerProfile", "lost", "plot_profile", "profile"]

Floats = npt.NDArray[np.float64]
Layer = tuple[str, int]
_MADE = ("site", "depth", "score", "kept", "valid")  # columns that are not a row's place in its example


@dataclass(frozen=True)
class LayerProfile:
    """What one layer has: a masked site, with masks read from one depth.

    Deviations are standard deviations over examples (divisor n - 1), NaN for one example.

    Attributes:
        site: the masked site.
        depth: the depth that was read.
        unit: the unit of all numbers here: `bits`, or `positions kept`.
        mean: the mean of a position.
        mean_deviation: of an example's mean.
        total: the sum over an example's positions; the mean over examples.
        total_deviation: of an example's sum.
        lost: an example's sum less its sum at the next layer, the mean over examples; negative if the next layer has
            more, NaN at the last layer.
        lost_deviation: of an example's loss.
        positions: the number of positions of all examples; if heads are gated, each head counts.
        examples: the number of examples.
    """

    site: str
    depth: int
    unit: str
    mean: float
    mean_deviation: float
    total: float
    total_deviation: float
    lost: float
    lost_deviation: float
    positions: int
    examples: int


def profile(explanation: Explanations) -> list[LayerProfile]:
    """Return what each layer has, lowest depth first.

    Args:
        explanation: an explanation, or an iterable of explanations of different examples, such as `Shards`; it is read
            one by one.

    Raises:
        SettingError: the scores do not add up over positions, two sites have one depth, or there is no valid position.
    """
    tables: list[tuple[list[Layer], Floats, Floats]] = []
    labels: set[str] = set()
    for part in [explanation] if isinstance(explanation, Explanation) else explanation:
        valid = part.select()
        if len(valid):
            labels.add(score_label(valid.provenance))
            tables.append(_by_example(valid))
    if not tables:
        raise SettingError("the explanation has no rows with a valid position, so there is no profile")
    pairs = sorted({pair for own, *_ in tables for pair in own}, key=lambda pair: pair[::-1])
    name = check_profile(pairs, common_label(labels))
    sums = np.concatenate([_aligned(table, own, pairs) for own, table, _ in tables])
    counts = np.concatenate([_aligned(table, own, pairs) for own, _, table in tables])
    rows = []
    for at, (site, depth) in enumerate(pairs):
        own, positions = counts[:, at] > 0, int(counts[:, at].sum())
        both = own & (counts[:, at + 1] > 0) if at + 1 < len(pairs) else np.zeros_like(own)
        mean, (_, mean_deviation) = float(sums[:, at].sum()) / positions, _spread(sums[own, at] / counts[own, at])
        total, less = _spread(sums[own, at]), _spread(sums[both, at] - sums[both, min(at + 1, len(pairs) - 1)])
        rows.append(LayerProfile(site, depth, name, mean, mean_deviation, *total, *less, positions, int(own.sum())))
    return rows


def lost(explanation: Explanation) -> Explanation:
    """Return what each position has more at a layer than at the next, as an explanation of all layers but the last.

    Scores are negative where the next layer has more. Pictures, pages and analyses take it like any other explanation:
    `lost(explanation).plot()`, `kept_by(lost(explanation), token_kind)`.

    Raises:
        SettingError: the scores do not add up over positions, two sites have one depth, there is one layer only, or
            layers have different positions.
    """
    valid = explanation.select()
    layers = Layers(valid.columns, valid.sites)
    label = score_label(explanation.provenance)
    check_profile(layers.pairs, label)
    if len(layers) < 2:
        raise SettingError("there is one layer only, so nothing is lost between layers. Explain several sites")
    names = [name for name in valid.columns if name not in _MADE]
    order = np.lexsort([*(valid[name] for name in reversed(names) if name != "label"), layers.which])
    parts = np.split(order, np.flatnonzero(np.diff(layers.which[order])) + 1)
    for at, (one, other) in enumerate(itertools.pairwise(parts)):
        if any(not np.array_equal(valid[name][one], valid[name][other]) for name in names):
            raise SettingError(
                f"{layers.pairs[at][0]} and {layers.pairs[at + 1][0]} have different positions, which cannot be "
                "subtracted from each other. profile(explanation) compares the layers' totals; or select layers with "
                "the same positions, as in explanation.select(depth=[0, 1])"
            )
    rows = np.concatenate(parts[:-1])
    score = valid["score"][rows] - valid["score"][np.concatenate(parts[1:])]
    columns = {**{name: column[rows] for name, column in valid.columns.items()}, "score": score, "kept": score > 0.5}
    provenance = _relabelled(valid.provenance, LOST if label == BITS else f"{label} lost to the next layer")
    return dataclasses.replace(valid, columns=columns, provenance=provenance).select()


def plot_profile(rows: Sequence[LayerProfile], *, title: str = "") -> Figure:
    """Draw the totals of layers and what is lost between them, with standard deviations over examples.

    Args:
        rows: from `profile`.
        title: by default the number of examples.
    """
    from maskhooks.viz.totals import Totals, totals

    count = max(row.examples for row in rows)
    found = Totals(
        [row.total for row in rows],
        [row.lost for row in rows[:-1]],
        rows[0].unit,
        [row.total_deviation for row in rows],
        [row.lost_deviation for row in rows[:-1]],
    )
    spread = f"mean and standard deviation of {count:,} examples" if count > 1 else "one example"
    return totals(found, [str(row.depth) for row in rows], title=title or spread)


def check_profile(pairs: Sequence[Layer], label: str) -> str:
    """Return the unit of sums over positions, if layers can be compared by them.

    Args:
        pairs: (site, depth) of each layer.
        label: what scores are called.

    Raises:
        SettingError: they cannot.
    """
    name = unit(label)
    if not name:
        raise SettingError(
            f"scores called {label!r} do not add up over positions, so layers cannot be compared by their sums. IBA "
            "gives bits, which do; kept_by(explanation, lambda label: 'all') gives mean scores by layer, and "
            "explanation.plot(kind='heatmap') draws them"
        )
    depths = [depth for _, depth in pairs]
    double = [depth for depth in depths if depths.count(depth) > 1]
    if double:
        sites = [site for site, depth in pairs if depth == double[0]]
        raise SettingError(
            f"{' and '.join(sites)} have the same depth, {double[0]}, so no layer comes next. Select a site for each "
            "depth: explanation.select(site=[...])"
        )
    return name


def profile_section(rows: Sequence[LayerProfile]) -> Section:
    """Return the profile of several layers in bits as a section of a page, the deepest at the top."""
    names = [f"depth {row.depth}" for row in rows]
    steps = [f"from depth {row.depth} to {above.depth}" for row, above in itertools.pairwise(rows)]
    totals = _bars(names, [(row.total, row.total_deviation) for row in rows], [row.site for row in rows])
    means = _bars(names, [(row.mean, row.mean_deviation) for row in rows])
    losses = _bars(steps, [(row.lost, row.lost_deviation) for row in rows[:-1]])
    return Section(
        "Information at each depth",
        "How many bits an example has in all its positions at each layer, in one of them, and how many fewer in all at "
        "the next layer; means over examples, with the standard deviation. Bits are upper bounds of what the layers "
        "above get to know, at the price that was set, and each layer's bound is measured by itself: where the next "
        "layer has more, the loss is below 0 and red.",
        [
            Bars(totals, ("layer", "bits in all positions")),
            Bars(means, ("layer", "bits in one position")),
            Bars(losses, ("layers", "bits lost")),
        ],
    )


def in_a_row(pairs: Collection[Layer], label: str) -> bool:
    """Return whether a page shows the profile: several layers in bits, each at a depth of its own."""
    return label == BITS and 1 < len(pairs) == len({depth for _, depth in pairs})


def profile_sections(explanation: Explanation) -> list[Section]:
    """Return the sections that a page has by itself: the profile, where there is one."""
    valid = explanation.select()
    pairs = Layers(valid.columns, valid.sites).pairs
    return [profile_section(profile(valid))] if in_a_row(pairs, score_label(valid.provenance)) else []


def _by_example(valid: Explanation) -> tuple[list[Layer], Floats, Floats]:
    """The layers, and the sum and the number of scores, `[example, layer]`."""
    layers = Layers(valid.columns, valid.sites)
    numbers, which = np.unique(valid["example"], return_inverse=True)
    cells, shape = which * len(layers) + layers.which, (len(numbers), len(layers))
    sums, counts = (np.bincount(cells, weights, math.prod(shape)).reshape(shape) for weights in (valid["score"], None))
    return layers.pairs, sums.astype(np.float64), counts.astype(np.float64)


def _aligned(table: Floats, own: Sequence[Layer], pairs: Sequence[Layer]) -> Floats:
    """`[example, layer]` with a column for each of `pairs`, 0 where there is none."""
    found = np.zeros((len(table), len(pairs)))
    found[:, [pairs.index(pair) for pair in own]] = table
    return found


def _spread(values: Floats) -> tuple[float, float]:
    """The mean and the standard deviation; NaN where there are too few values."""
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _bars(names: Sequence[str], spreads: Sequence[tuple[float, float]], notes: Sequence[str] = ()) -> list[Bar]:
    """A bar for each mean with its deviation, the last at the top; the longest has the full width."""
    end = max((abs(value) for value, _ in spreads if not math.isnan(value)), default=0.0) or 1.0
    bars = []
    for name, (value, deviation), note in zip(names, spreads, notes or [""] * len(names), strict=True):
        text = amount(value) + ("" if math.isnan(deviation) else f" ± {amount(deviation)}")
        bars.append(Bar(name, 0.0 if math.isnan(value) else value / end, text, note))
    return bars[::-1]


def _relabelled(provenance: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The provenance, also of each part, with another name of scores."""
    if "of" in provenance:
        return {**provenance, "of": [_relabelled(part, label) for part in provenance["of"]]}
    return {**provenance, "score_label": label}
