"""Findings: summaries of an explanation's rows, as sections of a page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from maskhooks.explanations.analyses import DepthsKept, GroupKept, depths_kept, kept_by
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.score_labels import P_KEPT, is_fraction
from maskhooks.explanations.tokens import KINDS, token_kind
from maskhooks.viz.amount import amount
from maskhooks.viz.sections import Bar, Bars, Cell, Grid, Section

Layer = tuple[str, int]
_GROUPS = 12  # maximum number of grid columns
_ENDS = 15  # tokens shown at either end
_RESTS = (
    "The prediction rests on tokens that are kept at high depths; tokens that are kept at no depth can be dropped from "
    "the start. "
)


def kind_of(labels: Iterable[str]) -> Callable[[str], str]:
    """Return `token_kind` with `marks_word_starts` set if any of these labels marks a word start."""
    marked = any(label.startswith(("Ġ", "▁")) for label in labels)
    return lambda label: token_kind(label, marks_word_starts=marked)


def by_depth(rows: Sequence[GroupKept], label: str = P_KEPT) -> Section:
    """Return a section with a bar for each layer, the deepest at the top.

    Args:
        rows: grouped so that each position belongs to exactly one group.
        label: what scores are called.
    """
    sums: dict[Layer, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        sums[row.site, row.depth][0] += row.score * row.positions
        sums[row.site, row.depth][1] += row.kept * row.positions
        sums[row.site, row.depth][2] += row.positions
    means = {layer: (score / count, kept / count) for layer, (score, kept, count) in sums.items()}
    top = _top([mean for mean, _ in means.values()], label)
    bars = [
        Bar(
            f"depth {depth}",
            0.0 if math.isnan(mean) else mean / top,
            f"{mean:.1%}  ({kept:.1%})" if is_fraction(label) else amount(mean),
            site,
        )
        for (site, depth), (mean, kept) in sorted(means.items(), key=lambda item: item[0][::-1], reverse=True)
    ]
    if label == P_KEPT:
        return Section(
            "What is kept at each depth",
            "The higher the depth, the more of the model has been computed when the mask decides. A long bar means "
            "that nearly every position at this depth carries something the prediction needs; a short bar means that "
            "few do. The first number is the mean score, the expected fraction kept; the number in brackets is the "
            "fraction of positions that are more likely kept than not.",
            [Bars(bars, ("masked", "kept"))],
        )
    if is_fraction(label):
        text = (
            f"The first number is the mean score, {label}; the number in brackets is the fraction of positions that "
            "score above one half."
        )
    else:
        text = f"The mean score, {label}, of a position."
    return Section("Scores at each depth", text, [Bars(bars, ("masked", label))])


def by_kind(rows: Sequence[GroupKept], label: str = P_KEPT) -> Section | None:
    """Return a grid of depths by kinds of token; None if all are of one kind."""
    names = [kind for kind in KINDS if any(row.group == kind for row in rows)]
    if len(names) < 2:
        return None
    return Section(
        "By kind of token",
        f"{_what(label, 'of each kind of token')} at each depth{_per_cent(label)}, the deepest at the top. The "
        "tokenizer adds special tokens, such as [CLS] and [SEP]; a continuation, such as ##ing, continues the word "
        "before it.",
        [_grid("", names, rows, label)],
    )


def by_group(parts: Iterable[Explanation], names: Sequence[str], label: str = P_KEPT) -> Section | None:
    """Return grids of depths by example metadata, such as predictions; None if nothing groups the examples.

    Args:
        names: metadata keys, such as `"prediction"`.
        label: what scores are called.
    """
    grids: dict[str, Grid] = {}
    for name in names:
        rows = kept_by(parts, name)
        sizes: dict[str, int] = defaultdict(int)
        for row in rows:
            sizes[row.group] = max(sizes[row.group], row.examples)
        largest = sorted((group for group in sizes if sizes[group] > 1), key=lambda group: (-sizes[group], group))
        if len(largest) > 1:
            grids[name] = _grid(name, largest[:_GROUPS], rows, label)
    if not grids:
        return None
    more = " If one class keeps more than another, the model needs more input to predict it." if label == P_KEPT else ""
    return Section(
        f"By {' and by '.join(grids)}",
        f"{_what(label, 'in the examples of each class')} at each depth{_per_cent(label)}.{more} Only the {_GROUPS} "
        "most frequent classes are shown.",
        list(grids.values()),
    )


def by_label(parts: Iterable[Explanation], min_count: int, num_layers: int, label: str = P_KEPT) -> Section:
    """Return bars for the tokens kept in the most depths, and for those kept in the fewest.

    Scores that are not fractions have no half, so their bars are means over the depths.

    Args:
        min_count: omit tokens that occur less often.
        num_layers: the number of depths.
        label: what scores are called.
    """
    masks = label == P_KEPT
    heads, ends = ("token", "depths"), ("kept most", "kept least") if masks else ("highest", "lowest")
    if is_fraction(label):
        bars = _depth_bars(depths_kept(parts, "label", min_count=min_count), num_layers)
        text = (
            f"In how many of the {num_layers} depths a token {'is kept' if masks else 'scores above one half'}, on "
            "average over its occurrences, with the standard error. " + (_RESTS if masks else "")
        )
    else:
        bars, heads = _mean_bars(kept_by(parts, "label", min_count=min_count), label), ("token", label)
        text = f"The mean score of a token, {label}, over its occurrences and the {num_layers} depths. "
    text += f"Tokens that occur fewer than {min_count} times are omitted."
    if not bars:
        return Section("By token", f"No token occurs {min_count} times.")
    if len(bars) <= 2 * _ENDS:
        return Section("By token", text, [Bars(bars, heads)])
    return Section("By token", text, [Bars(bars[:_ENDS], heads, ends[0]), Bars(bars[-_ENDS:], heads, ends[1])])


def _depth_bars(rows: Sequence[DepthsKept], num_layers: int) -> list[Bar]:
    return [
        Bar(
            _shown(row.group),
            row.depths / num_layers,
            f"{row.depths:.2f}" + ("" if math.isnan(row.standard_error) else f" ± {row.standard_error:.2f}"),
            f"{row.positions:,} times",
        )
        for row in rows
    ]


def _mean_bars(rows: Sequence[GroupKept], label: str) -> list[Bar]:
    """The mean score of each group over all layers, the highest first."""
    groups: dict[str, list[GroupKept]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    means = {
        name: sum(row.score * row.positions for row in own) / sum(row.positions for row in own)
        for name, own in groups.items()
    }
    top = _top(means.values(), label)
    return [
        Bar(_shown(name), mean / top, amount(mean), f"{max(row.positions for row in groups[name]):,} times")
        for name, mean in sorted(means.items(), key=lambda item: (-item[1], item[0]))
    ]


def _shown(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥") if token.strip() else "␣" * max(len(token), 1)


def _top(means: Iterable[float], label: str) -> float:
    """The mean score at which bars and shades end."""
    if is_fraction(label):
        return 1.0
    return max((abs(mean) for mean in means if not math.isnan(mean)), default=0.0) or 1.0


def _grid(corner: str, names: Sequence[str], rows: Sequence[GroupKept], label: str) -> Grid:
    """Layers by groups, the deepest layer at the top."""
    found = {(row.site, row.depth, row.group): row for row in rows}
    layers = sorted({(row.depth, row.site) for row in rows}, reverse=True)
    depths = [depth for depth, _ in layers]
    counts = {name: max(row.examples for row in rows if row.group == name) for name in names}
    top = _top([row.score for row in rows if row.group in names], label)
    return Grid(
        corner,
        [(name, f"{counts[name]:,} example{'s' * (counts[name] != 1)}") for name in names],
        [f"depth {depth}" + (f" ({site})" if depths.count(depth) > 1 else "") for depth, site in layers],
        [[_cell(found.get((site, depth, name)), label, top) for name in names] for depth, site in layers],
    )


def _what(label: str, whose: str) -> str:
    return f"How much {whose} is kept" if label == P_KEPT else f"The mean score {whose}, {label},"


def _per_cent(label: str) -> str:
    return ", in per cent" if is_fraction(label) else ""


def _cell(row: GroupKept | None, label: str, top: float) -> Cell:
    if row is None or math.isnan(row.score):
        return Cell(None)
    fraction = is_fraction(label)
    value = f"{row.score:.3f}" if fraction else amount(row.score)
    mean = f"{row.score:.1%} kept on average" if label == P_KEPT else f"mean {label} {value}"
    return Cell(
        row.score / top,
        f"{row.group}, depth {row.depth}: {mean} over {row.positions:,} positions of {row.examples:,} examples",
        "" if fraction else value,
    )
