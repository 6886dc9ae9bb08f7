"""Tokens: their kinds, the words that pieces belong to, and tags of those words."""

from __future__ import annotations

import pytest

from maskhooks.errors import SettingError
from maskhooks.explanations.tokens import KINDS, tags_to_pieces, token_kind, words


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (
            "special",
            "[CLS] [SEP] [MASK] [unused12] <s> </s> <pad> <|endoftext|> <|im_start|> <extra_id_0> <start_of_turn>",
        ),
        ("punctuation", ". , !? ' -- ... ( $ Ġ, ▁. ~ § [ < > <>"),
        ("number", "7 1,000 3.14 12:30 -5 50% Ġ42 ▁1/2"),
        ("continuation", "##ing ##2 ##s"),
        (
            "word",
            "film Film don't n't 's 1st covid-19 Ġgood ▁good good</w> фильм <b> <script>alert(1)</script> [sic] #1a",
        ),
        ("other", "Ġ ▁ Ċ ĠĠĠ ĊĊ \u0301"),
    ],
)
def test_kinds(kind: str, labels: str) -> None:
    assert {label: token_kind(label) for label in labels.split()} == dict.fromkeys(labels.split(), kind)
    assert kind in KINDS


def test_what_has_no_letters_is_other() -> None:
    assert [token_kind(label) for label in ("", " ", "\n", "\xa0", "²")] == ["other"] * 5
    assert token_kind("##") == "punctuation"


def test_where_starts_are_marked_the_rest_goes_on() -> None:
    labels = ["<s>", "▁un", "happy", "▁film", "s", ".", "▁7", "</s>"]
    kinds = [token_kind(label, marks_word_starts=True) for label in labels]
    assert kinds == ["special", "word", "continuation", "word", "continuation", "punctuation", "number", "special"]


@pytest.mark.parametrize(
    ("labels", "marked", "numbers"),
    [
        ("[CLS] un ##happy films , don ' t [UNK] ##s [SEP]", False, [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("<s> ▁un happy ▁film s . ▁ 2 0 ▁1 9 </s>", True, [0, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5, 6]),
        ("Hello , Ġwor ld", True, [0, 1, 2, 2]),
        ("Hel lo", True, [0, 0]),
    ],
)
def test_pieces_have_the_number_of_their_word(labels: str, marked: bool, numbers: list[int]) -> None:
    assert words(labels.split(), marks_word_starts=marked) == numbers


def test_tags_go_to_the_word_that_a_piece_shares_most_with() -> None:
    # "unhappy don't film"
    words = [(0, 7), (8, 13), (14, 18)]
    pieces = [(0, 0), (0, 2), (2, 7), (8, 11), (11, 12), (12, 13), (13, 18), (0, 0), (0, 0)]
    tags = ["ADJ", "VERB", "NOUN"]
    assert tags_to_pieces(tags, words, pieces) == [None, "ADJ", "ADJ", "VERB", "VERB", "VERB", "NOUN", None, None]
    assert tags_to_pieces(tags, words, [(5, 10), (12, 15), (7, 8), (0, 18), (40, 44)]) == [
        "ADJ",
        "VERB",
        None,
        "ADJ",
        None,
    ]
    assert tags_to_pieces([], [], [(0, 3)]) == [None]
    with pytest.raises(SettingError, match="2 tags for 3 words"):
        tags_to_pieces(tags[:2], words, pieces)
