"""Findings: summaries of an explanation's rows, as sections of a page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from maskhooks.explanations.analyses import DepthsKept, GroupKept, depths_kept, kept_by
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.score_labels import P_KEPT
from maskhooks.explanations.tokens import KINDS, token_kind
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
    bars = [
        Bar(
            f"depth {depth}",
            0.0 if math.isnan(score) else score / count,
            f"{score / count:.1%}  ({kept / count:.1%})",
            site,
        )
        for (site, depth), (score, kept, count) in sorted(sums.items(), key=lambda item: item[0][::-1], reverse=True)
    ]
    if label != P_KEPT:
        return Section(
            "Scores at each depth",
            f"The first number is the mean score, {label}; the number in brackets is the fraction of positions that "
            "score above one half.",
            [Bars(bars, ("site", label))],
        )
    return Section(
        "What is kept at each depth",
        "The higher the depth, the more of the model has been computed when the mask decides. A long bar means that "
        "nearly every position at this depth carries something the prediction needs; a short bar means that few do. "
        "The first number is the mean score, the expected fraction kept; the number in brackets is the fraction of "
        "positions that are more likely kept than not.",
        [Bars(bars, ("masked", "kept"))],
    )


def by_kind(rows: Sequence[GroupKept], label: str = P_KEPT) -> Section | None:
    """Return a grid of depths by kinds of token; None if all are of one kind."""
    names = [kind for kind in KINDS if any(row.group == kind for row in rows)]
    if len(names) < 2:
        return None
    return Section(
        "By kind of token",
        f"{_what(label, 'of each kind of token')} at each depth, in per cent, the deepest at the top. The tokenizer "
        "adds special tokens, such as [CLS] and [SEP]; a continuation, such as ##ing, continues the word before it.",
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
        f"{_what(label, 'in the examples of each class')} at each depth, in per cent.{more} Only the {_GROUPS} most "
        "frequent classes are shown.",
        list(grids.values()),
    )


def by_label(parts: Iterable[Explanation], min_count: int, num_layers: int, label: str = P_KEPT) -> Section:
    """Return bars for the tokens kept in the most depths, and for those kept in the fewest.

    Args:
        min_count: omit tokens that occur less often.
        num_layers: the number of depths.
        label: what scores are called.
    """
    rows = depths_kept(parts, "label", min_count=min_count)
    masks = label == P_KEPT
    text = (
        f"In how many of the {num_layers} depths a token {'is kept' if masks else 'scores above one half'}, on average "
        "over its occurrences, with the standard error. "
        + (_RESTS if masks else "")
        + f"Tokens that occur fewer than {min_count} times are omitted."
    )
    heads, ends = ("token", "depths"), ("kept most", "kept least") if masks else ("highest", "lowest")
    if not rows:
        return Section("By token", f"No token occurs {min_count} times.")
    if len(rows) <= 2 * _ENDS:
        return Section("By token", text, [Bars(_bars(rows, num_layers), heads)])
    most, fewest = _bars(rows[:_ENDS], num_layers), _bars(rows[-_ENDS:], num_layers)
    return Section("By token", text, [Bars(most, heads, ends[0]), Bars(fewest, heads, ends[1])])


def _bars(rows: Sequence[DepthsKept], num_layers: int) -> list[Bar]:
    return [
        Bar(
            row.group.replace("\n", "↵").replace("\t", "⇥") if row.group.strip() else "␣" * max(len(row.group), 1),
            row.depths / num_layers,
            f"{row.depths:.2f}" + ("" if math.isnan(row.standard_error) else f" ± {row.standard_error:.2f}"),
            f"{row.positions:,} times",
        )
        for row in rows
    ]


def _grid(corner: str, names: Sequence[str], rows: Sequence[GroupKept], label: str) -> Grid:
    """Layers by groups, the deepest layer at the top."""
    found = {(row.site, row.depth, row.group): row for row in rows}
    layers = sorted({(row.depth, row.site) for row in rows}, reverse=True)
    depths = [depth for depth, _ in layers]
    counts = {name: max(row.examples for row in rows if row.group == name) for name in names}
    return Grid(
        corner,
        [(name, f"{counts[name]:,} example{'s' * (counts[name] != 1)}") for name in names],
        [f"depth {depth}" + (f" ({site})" if depths.count(depth) > 1 else "") for depth, site in layers],
        [[_cell(found.get((site, depth, name)), label) for name in names] for depth, site in layers],
    )


def _what(label: str, whose: str) -> str:
    return f"How much {whose} is kept" if label == P_KEPT else f"The mean score {whose}, {label},"


def _cell(row: GroupKept | None, label: str) -> Cell:
    if row is None or math.isnan(row.score):
        return Cell(None)
    mean = f"{row.score:.1%} kept on average" if label == P_KEPT else f"mean {label} {row.score:.3f}"
    return Cell(
        row.score,
        f"{row.group}, depth {row.depth}: {mean} over {row.positions:,} positions of {row.examples:,} examples",
    )
