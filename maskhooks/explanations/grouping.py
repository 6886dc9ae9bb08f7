"""Grouping: which group each row of an explanation belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maskhooks.errors import SettingError, near
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.scores import Column

Codes = npt.NDArray[np.intp]
Group: TypeAlias = str | Callable[[str], object] | Mapping[str, object] | Sequence[Sequence[object]] | npt.NDArray[Any]


@dataclass(frozen=True)
class Grouped:
    """The real rows of an explanation that belong to a group.

    Attributes:
        rows: their indices.
        codes: for each the index of its group.
        names: of the groups.
    """

    rows: Codes
    codes: Codes
    names: Sequence[str]


def grouped(explanation: Explanation, group: Group) -> Grouped:
    """The rows of real positions by group; those without a group (None) are left out.

    Args:
        explanation: the rows.
        group: what a position belongs to.

            - what is known of the examples, such as `"prediction"` or `"target"`;
            - the name of a column, such as `"label"` or `"position"`;
            - a function from a label to its group, such as `token_kind`, called once for each different label;
            - a mapping from labels to groups;
            - tags of yours, such as parts of speech: `tags[example][position]`, by the numbers that the columns have;
            - a numpy array with an entry for each row.

    Raises:
        SettingError: no such column, or tags that do not fit.
    """
    rows = np.flatnonzero(explanation["valid"])
    if isinstance(group, str):
        codes, found = _by_name(explanation, group, rows)
    elif isinstance(group, Mapping):
        codes, found = _by_label(explanation, group.get, rows)
    elif callable(group):
        codes, found = _by_label(explanation, group, rows)
    elif hasattr(group, "__array__") and np.asarray(group).ndim < 2:
        codes, found = _factorize(_by_row(explanation, np.asarray(group))[rows])
    else:
        codes, found = _by_tag(explanation, group, rows)
    return Grouped(rows[codes >= 0], codes[codes >= 0], [str(name) for name in found])


def _by_name(explanation: Explanation, name: str, rows: Codes) -> tuple[Codes, Column]:
    keys = list(dict.fromkeys(key for about in explanation.examples.values() for key in about))
    if name in explanation.columns and name not in keys:  # an edge has a target, and so may its graph
        return _factorize(explanation[name][rows])
    if name not in keys:
        known = [*explanation.columns, *keys]
        guess = "".join(f" Did you mean {one!r}?" for one in near(name, known, 1))
        raise SettingError(
            f"no column {name!r} to group by, and nothing of that name is known of the examples; there are "
            f"{', '.join(known)}.{guess}"
        )
    numbers, which = np.unique(explanation["example"][rows], return_inverse=True)
    values = [explanation.examples.get(int(number), {}).get(name) for number in numbers]
    codes, found = _factorize(np.array([*values, None], dtype=object)[:-1])
    return codes[which], found


def _by_label(explanation: Explanation, name_of: Callable[[str], object], rows: Codes) -> tuple[Codes, Column]:
    which, labels = _factorize(explanation["label"][rows])
    codes, found = _factorize(np.array([*(name_of(str(label)) for label in labels), None], dtype=object)[:-1])
    return codes[which], found


def _by_row(explanation: Explanation, array: Column) -> Column:
    if array.shape != (len(explanation),):
        raise SettingError(
            f"an array of shape {list(array.shape)} to group {len(explanation)} rows by. Give an entry for each row, "
            f"padding too, or tags[example][position]"
        )
    return array


def _by_tag(
    explanation: Explanation, tags: Sequence[Sequence[object]] | npt.NDArray[Any], rows: Codes
) -> tuple[Codes, Column]:
    if any(isinstance(line, str) for line in tags):
        raise SettingError(
            "a flat list of tags to group by. Give a list for each example: tags[example][position]; or a numpy array "
            "with an entry for each row"
        )
    example, position = explanation["example"][rows], explanation["position"][rows]
    if example.max(initial=-1) >= len(tags):
        raise SettingError(
            f"tags for {len(tags)} examples, numbered from 0, and rows of example {example.max()}. Give a list of tags "
            f"for each example, in the order of their numbers; an empty list where you have none"
        )
    lengths = np.array([len(line) for line in tags], np.int64)
    short = (position >= lengths[example]) & (lengths[example] > 0)
    if short.any():
        at = int(np.argmax(short))
        raise SettingError(
            f"{lengths[example[at]]} tags for example {example[at]}, which has a real position {position[at]}. Give a "
            f"tag for each position, special tokens too, None for those without one; spread() takes tags from words to "
            f"word pieces"
        )
    flat = np.array([*(tag for line in tags for tag in line), None], dtype=object)
    codes, found = _factorize(flat)  # its last entry is for examples without tags
    starts = np.cumsum(lengths) - lengths
    return codes[np.where(lengths[example] > 0, starts[example] + position, len(flat) - 1)], found


def _factorize(values: Column) -> tuple[Codes, Column]:
    """For each value the index of its like, -1 for None and NaN; and the different values."""
    import pandas as pd

    codes, found = pd.factorize(values)
    return codes, np.asarray(found, dtype=object)
