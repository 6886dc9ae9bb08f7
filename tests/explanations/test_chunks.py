"""Chunks: data in portions of whole batches, with each example's number, shared out and checked for changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskhooks.errors import BatchError, ResumeError, SettingError
from maskhooks.explanations.chunks import Chunks


def portions(data: Any, collate: Any = list, **given: Any) -> Chunks:
    settings = {"batch_size": 3, "length": None, "batches": 2, "shard": (0, 1), **given}
    return Chunks(data, collate, **settings)


def test_examples_come_in_portions_of_whole_batches() -> None:
    found = portions(iter("abcdefghijklmn"))
    assert [(number, "".join(items)) for number, items in found] == [(0, "abcdef"), (1, "ghijkl"), (2, "mn")]
    assert list(found.made(list("abcd"), 10)) == [(["a", "b", "c"], [10, 11, 12]), (["d"], [13])]


def test_examples_of_like_length_share_a_batch_and_keep_their_numbers() -> None:
    texts = ["ccc", "a", "dddd", "bb", "aa"]
    found = list(portions(texts, length=len).made(texts, 10))
    assert found == [(["a", "bb", "aa"], [11, 13, 14]), (["ccc", "dddd"], [10, 12])]


def test_batches_are_taken_as_they_are_and_follow_each_other() -> None:
    batches = [torch.zeros(4, 2), torch.zeros(1, 2), torch.zeros(2, 2)]
    found = portions(batches, None)
    assert [(number, len(items)) for number, items in found] == [(0, 2), (1, 1)]
    assert [first for _, first in found.made(batches[:2], 7)] == [7, None]
    assert found.count(batches) == 7


def test_nothing_is_read_before_it_is_asked_for() -> None:
    seen: list[int] = []

    def data() -> Any:
        for number in range(100):
            seen.append(number)
            yield number

    next(iter(portions(data())))
    assert seen == list(range(6))


@pytest.mark.parametrize("total", [0, 1, 6, 7, 20, 24])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_share_the_work(total: int, parts: int) -> None:
    mine = []
    for which in range(parts):
        found = portions(range(total), shard=(which, parts))
        items = [item for number, items in found if found.mine(number) for item in items]
        assert found.share(total) == len(items)
        mine += items
    assert sorted(mine) == list(range(total))
    assert portions([], shard=(0, parts)).share(None) is None


def test_other_data_in_the_place_of_a_file_are_noticed(tmp_path: Any) -> None:
    portions([]).check(["a", "b"], 2, tmp_path / "part")
    with pytest.raises(ResumeError, match=r"part holds 3 examples, but the data now give 2"):
        portions([]).check(["a", "b"], 3, tmp_path / "part")


def test_batches_that_do_not_say_their_size_cannot_be_parted() -> None:
    found = portions([], None, shard=(0, 2))
    with pytest.raises(BatchError, match=r"has no tensor.*collate"):
        found.count([["text"]])
    with pytest.raises(BatchError, match=r"batches with 4 examples, by the first axis.*gave 3.*collate"):
        found.check([torch.zeros(4, 3)], 3)
    portions([], None).check([["text"]], 3)  # one process counts what comes out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batches": -1}, "batches must be a whole number of at least 1, got -1"),
        ({"shard": (2, 2)}, "no shard 2 of 2"),
        ({"shard": (-1, 2)}, "no shard -1 of 2"),
        ({"collate": None, "length": len}, "length sorts examples"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        portions([], **{"collate": list, **given})
