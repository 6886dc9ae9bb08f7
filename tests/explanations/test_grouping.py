"""Groups of rows: by label, by a function, or by tags of words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.grouping import Grouped, grouped
from maskhooks.sites.site import Site

WORDS = [["[CLS]", "not", "bad", "[SEP]"], ["[CLS]", "good", "[SEP]"]]
REAL = torch.tensor([[True] * 4, [True] * 3 + [False]])


def explanation(depths: int = 2) -> Explanation:
    pattern = "batch token hidden -> batch token"
    parts = [
        Scores(Site.parse(f"layer.{depth}:output", pattern), depth, torch.rand(2, 4), REAL, WORDS)
        for depth in range(depths)
    ]
    return Explanation.build(parts, provenance={}, metadata=[{"target": "a", "prediction": "b"}, {"prediction": "c"}])


def by_row(found: Grouped) -> dict[int, str]:
    return {int(row): found.names[code] for row, code in zip(found.rows, found.codes, strict=True)}


LABELS = [word for _ in range(2) for line in WORDS for word in line]
REAL_ROWS = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("label", LABELS),
        (str.upper, [label.upper() for label in LABELS]),
        ({"good": "+", "bad": "-"}, [{"good": "+", "bad": "-"}.get(label) for label in LABELS]),
        (lambda label: None if label[0] == "[" else len(label), [None if w[0] == "[" else str(len(w)) for w in LABELS]),
        ("depth", ["0"] * 7 + ["1"] * 7),
        ("site", ["layer.0:output"] * 7 + ["layer.1:output"] * 7),
        ("prediction", (["b"] * 4 + ["c"] * 3) * 2),
        ("target", (["a"] * 4 + [None] * 3) * 2),
        ([["S", "ADV", "ADJ", None], ["S", "ADJ", "S"]], ["S", "ADV", "ADJ", None, "S", "ADJ", "S"] * 2),
        ([[0, 1, 2, 3, 99], []], ["0", "1", "2", "3", None, None, None] * 2),
        (np.array([["S", "A", "A", "S"], ["S", "B", "S", "-"]]), ["S", "A", "A", "S", "S", "B", "S"] * 2),
        (np.arange(16) % 8, [str(row % 8) for row in REAL_ROWS]),
        (np.array(["x", None] * 8), ["x", None, "x", None, "x", None, "x"] * 2),
    ],
)
def test_each_real_row_has_its_group(group: Any, expected: list[str | None]) -> None:
    wanted = {row: name for row, name in zip(REAL_ROWS, expected, strict=True) if name is not None}
    assert by_row(grouped(explanation(), group)) == wanted


def test_a_function_is_called_once_for_each_different_label() -> None:
    calls: list[str] = []

    def name_of(label: str) -> str:
        calls.append(label)
        return label

    grouped(explanation(8), name_of)
    assert sorted(calls) == sorted({*WORDS[0], *WORDS[1]})


def test_tags_belong_to_numbers_of_examples() -> None:
    tags = [["S", "ADV", "ADJ", "S"], ["S", "NOUN", "S"]]
    second = explanation().select(example=1)
    assert list(by_row(grouped(second, tags)).values()) == ["S", "NOUN", "S"] * 2


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("lable", r"no column 'lable'.*label.*target, prediction\. Did you mean 'label'"),
        ([["S"] * 4], "tags for 1 examples, numbered from 0, but rows of example 1"),
        ([["S"] * 4, ["S"]], "1 tags for example 1, which has a valid position 1"),
        (["S", "NOUN"], r"tags are a flat list.*tags\[example\]\[position\]"),
        (np.array(["S"] * 14), r"shape \[14\] cannot group 16 rows"),
    ],
)
def test_what_does_not_fit_is_named(group: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        grouped(explanation(), group)


def test_an_explanation_without_rows_has_no_groups() -> None:
    empty = explanation().select(example=0, valid=False)
    for group in ("label", str.upper, {}, [["S"]], np.array([])):
        assert len(grouped(empty, group).rows) == 0
