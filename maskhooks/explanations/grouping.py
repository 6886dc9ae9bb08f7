"""Grouping: assign the rows of an explanation to groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maskhooks.errors import SettingError, close_matches
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.scores import Column

Codes = npt.NDArray[np.intp]
Group: TypeAlias = str | Callable[[str], object] | Mapping[str, object] | Sequence[Sequence[object]] | npt.NDArray[Any]


@dataclass(frozen=True)
class Grouped:
    """The valid rows of an explanation that belong to a group.

    Attributes:
        rows: their indices.
        codes: the group index of each.
        names: the names of the groups.
    """

    rows: Codes
    codes: Codes
    names: Sequence[str]


def grouped(explanation: Explanation, group: Group) -> Grouped:
    """Group the rows of valid positions; rows without a group (None) are dropped.

    Args:
        explanation: the rows.
        group: how to group positions:

            - a key of the examples' metadata, such as `"prediction"` or `"target"`;
            - the name of a column, such as `"label"` or `"position"`;
            - a function from a label to its group, such as `token_kind`, called once for each distinct label;
            - a mapping from labels to groups;
            - your own tags, such as parts of speech: `tags[example][position]`, indexed as in the columns;
            - a numpy array with an entry for each row.

    Raises:
        SettingError: there is no such column, or the tags do not fit.
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
    keys = list(dict.fromkeys(key for known in explanation.metadata.values() for key in known))
    if name in explanation.columns and name not in keys:  # both an edge and its graph may have a "target"
        return _factorize(explanation[name][rows])
    if name not in keys:
        known = [*explanation.columns, *keys]
        guess = "".join(f" Did you mean {one!r}?" for one in close_matches(name, known, 1))
        raise SettingError(
            f"there is no column {name!r} to group by, and the examples have no such metadata. Group by one of "
            f"{', '.join(known)}.{guess}"
        )
    numbers, which = np.unique(explanation["example"][rows], return_inverse=True)
    values = [explanation.metadata.get(int(number), {}).get(name) for number in numbers]
    codes, found = _factorize(np.array([*values, None], dtype=object)[:-1])
    return codes[which], found


def _by_label(explanation: Explanation, name_of: Callable[[str], object], rows: Codes) -> tuple[Codes, Column]:
    which, labels = _factorize(explanation["label"][rows])
    codes, found = _factorize(np.array([*(name_of(str(label)) for label in labels), None], dtype=object)[:-1])
    return codes[which], found


def _by_row(explanation: Explanation, array: Column) -> Column:
    if array.shape != (len(explanation),):
        raise SettingError(
            f"an array of shape {list(array.shape)} cannot group {len(explanation)} rows. Give an entry for each row, "
            f"including padding, or tags[example][position]"
        )
    return array


def _by_tag(
    explanation: Explanation, tags: Sequence[Sequence[object]] | npt.NDArray[Any], rows: Codes
) -> tuple[Codes, Column]:
    if any(isinstance(line, str) for line in tags):
        raise SettingError(
            "the tags are a flat list. Give a list for each example, tags[example][position], or a numpy array "
            "with an entry for each row"
        )
    example, position = explanation["example"][rows], explanation["position"][rows]
    if example.max(initial=-1) >= len(tags):
        raise SettingError(
            f"there are tags for {len(tags)} examples, numbered from 0, but rows of example {example.max()}. Give a "
            f"list of tags for each example, in order of example index; an empty list where you have none"
        )
    lengths = np.array([len(line) for line in tags], np.int64)
    short = (position >= lengths[example]) & (lengths[example] > 0)
    if short.any():
        at = int(np.argmax(short))
        raise SettingError(
            f"there are {lengths[example[at]]} tags for example {example[at]}, which has a valid position "
            f"{position[at]}. Give a tag for each position, including special tokens, and None for those without one; "
            f"tags_to_pieces() maps tags from words to word pieces"
        )
    flat = np.array([*(tag for line in tags for tag in line), None], dtype=object)
    codes, found = _factorize(flat)  # the last entry is for examples without tags
    starts = np.cumsum(lengths) - lengths
    return codes[np.where(lengths[example] > 0, starts[example] + position, len(flat) - 1)], found


def _factorize(values: Column) -> tuple[Codes, Column]:
    """Each value's index into the distinct values (-1 for None and NaN), and the distinct values."""
    import pandas as pd

    codes, found = pd.factorize(values)
    return codes, np.asarray(found, dtype=object)
