"""Tokens: classify them by label, and map them to words."""

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


def token_kind(label: str, *, marks_word_starts: bool = False) -> str:
    """Return the kind of a token, one of `KINDS`.

    - special: `[CLS]`, `</s>`, `<|endoftext|>`, ...
    - punctuation: only punctuation and symbols
    - number: digits, with a sign, separators or a per cent sign
    - continuation: a piece that continues the word before it: `##ing`
    - word: anything else with a letter
    - other: whitespace, line breaks, empty labels

    Args:
        label: as the tokenizer writes it; marks of word starts (`Ġ`, `▁`) or ends (`</w>`) do not count.
        marks_word_starts: whether the tokenizer marks word starts, so that letters without a mark continue the word
            before them. One label cannot show this: `ing` continues a word in GPT-2, and is a word in BERT. The first
            word of a text often has no mark either.
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
    return "continuation" if marks_word_starts and label[0] not in _STARTS else "word"


def words(labels: Sequence[str], *, marks_word_starts: bool = False) -> list[int]:
    """Return the word index of each token, from 0.

    Special tokens, punctuation and whitespace are separate words; a new word starts after a special token.

    Args:
        labels: the tokens of one text, as the tokenizer writes them.
        marks_word_starts: as in `token_kind`.
    """
    numbers: list[int] = []
    last = "special"
    for label in labels:
        kind = token_kind(label, marks_word_starts=marks_word_starts)
        digits = kind == "number" and marks_word_starts and label[0] not in _STARTS
        joined = kind == "continuation" or (digits and last in ("number", "other"))
        numbers.append(numbers[-1] + (last == "special" or not joined) if numbers else 0)
        last = kind
    return numbers


def tags_to_pieces(
    tags: Sequence[Tag], words: Sequence[tuple[int, int]], pieces: Sequence[Sequence[int]]
) -> list[Tag | None]:
    """Map tags of words to the word pieces of the same text.

    Args:
        tags: one for each word.
        words: start and end of each word in the text, in characters, in order, without overlap.
        pieces: start and end of each word piece, from a fast tokenizer's `return_offsets_mapping=True`.

    Returns:
        For each piece, the tag of the word it shares most characters with (the first of equals), or None if it shares
        none, as for special tokens.

    Raises:
        SettingError: the numbers of tags and words differ.
    """
    if len(tags) != len(words):
        raise SettingError(f"there are {len(tags)} tags for {len(words)} words. Give one tag, or None, for each word")
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
