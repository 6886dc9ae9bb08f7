"""Tokens by their labels: what kind they are, and which words they belong to."""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Sequence
from typing import TypeVar

from maskhooks.errors import SettingError

Tag = TypeVar("Tag")

KINDS = ("special", "punctuation", "number", "continuation", "word", "other")

_SPECIAL = re.compile(
    r"\[[A-Z]{2,}\d*\]|\[unused\d+\]|<\|[^<>]*\|>|<\uff5c[^<>]*\uff5c>"
    r"|</?(?:s|pad|unk|mask|bos|eos|cls|sep|unused\d+|[a-z]+_[a-z0-9_]+)>"
)
_NUMBER = re.compile(r"[+-]?\d[\d.,:/]*%?")
_STARTS = "Ġ▁"
_BLANKS = "ĠĊĉč▁ \n\t\r"


def token_kind(label: str, *, starts_marked: bool = False) -> str:
    """What kind of token a label is: one of `KINDS`.

    - special: `[CLS]`, `</s>`, `<|endoftext|>`, ...
    - punctuation: punctuation and symbols alone
    - number: digits, with a sign, separators or per cent
    - continuation: a piece that goes on with the word before it: `##ing`
    - word: anything else with a letter
    - other: blanks, line breaks, nothing

    Args:
        label: as the tokenizer writes it; the marks that begin words (`Ġ`, `▁`) or end them (`</w>`) do not count.
        starts_marked: whether the tokenizer marks where words start, so that letters without a mark go on with the word
            before them. One label cannot say so itself: `ing` continues a word for GPT-2, and is one for BERT. The
            first word of a text often has no mark either.
    """
    if _SPECIAL.fullmatch(label):
        return "special"
    if label.startswith("##") and len(label) > 2:
        return "continuation"
    text = label.removesuffix("</w>").strip(_BLANKS)
    if not text:
        return "other"
    if _NUMBER.fullmatch(text):
        return "number"
    if all(unicodedata.category(letter)[0] in "PS" for letter in text):
        return "punctuation"
    if not any(letter.isalpha() for letter in text):
        return "other"
    return "continuation" if starts_marked and label[0] not in _STARTS else "word"


def words(labels: Sequence[str], *, starts_marked: bool = False) -> list[int]:
    """For each token the number of the word that it is a piece of, from 0.

    Special tokens, punctuation and blanks are words of their own; what follows a special token begins one.

    Args:
        labels: the tokens of one text, as the tokenizer writes them.
        starts_marked: as in `token_kind`.
    """
    numbers: list[int] = []
    last = "special"
    for label in labels:
        kind = token_kind(label, starts_marked=starts_marked)
        digits = kind == "number" and starts_marked and label[0] not in _STARTS
        joined = kind == "continuation" or (digits and last in ("number", "other"))
        numbers.append(numbers[-1] + (last == "special" or not joined) if numbers else 0)
        last = kind
    return numbers


def spread(tags: Sequence[Tag], words: Sequence[tuple[int, int]], pieces: Sequence[Sequence[int]]) -> list[Tag | None]:
    """Tags of words, for the word pieces of the same text.

    Args:
        tags: one for each word.
        words: where each word begins and ends in the text, in characters, in order, without overlap.
        pieces: where each word piece begins and ends: a fast tokenizer's `return_offsets_mapping=True`.

    Returns:
        For each piece the tag of the word it shares the most characters with, the first of equals; None where it shares
        none with any, as special tokens do.

    Raises:
        SettingError: another number of tags than words.
    """
    if len(tags) != len(words):
        raise SettingError(f"{len(tags)} tags for {len(words)} words: give one tag, or None, for each word")
    tagged = list(zip(tags, words, strict=True))
    ends = [end for _, end in words]
    found: list[Tag | None] = []
    for start, stop in pieces:
        best, most = None, 0
        for tag, (first, end) in tagged[bisect.bisect_right(ends, start) :]:
            if first >= stop:
                break
            shared = min(stop, end) - max(start, first)
            if shared > most:
                best, most = tag, shared
        found.append(best)
    return found
