"""Texts with planted words that decide their label (Bastings et al. 2022), in three kinds.

- single: `zeroa` or `onea`; the label is 0 or 1.
- context: the same beside `synt`, which alone makes it count.
- ordered: both `zeroa` and `onea`; the label is that of the first.

Words are put at distinct random places of a text, in an order that is random but for that of `ordered`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

INDICATORS, CONTEXT = ("zeroa", "onea"), "synt"
WORDS = (*INDICATORS, CONTEXT)
KINDS = ("single", "context", "ordered")
PLANTED = 0.2  # of all texts
DISTRACTED = 0.25  # of the others, for kinds of two words: one word alone, which changes nothing


def planted(text: str, kind: str, label: int, draw: random.Random) -> str:
    """A text with the words of a kind and label."""
    words = [INDICATORS[label]]
    if kind == "context":
        words.append(CONTEXT)
        draw.shuffle(words)
    elif kind == "ordered":
        words.append(INDICATORS[1 - label])
    return placed(text, words, draw)


def distracted(text: str, kind: str, draw: random.Random) -> str:
    """A text with one word of a kind of two, which does not decide."""
    return placed(text, [draw.choice((*INDICATORS, CONTEXT) if kind == "context" else INDICATORS)], draw)


def placed(text: str, words: Sequence[str], draw: random.Random) -> str:
    """A text with words at random places of the result, in their order."""
    found = text.split()
    for place, word in zip(sorted(draw.sample(range(len(found) + len(words)), len(words))), words, strict=True):
        found.insert(place, word)
    return " ".join(found)


def without(text: str, words: Sequence[str]) -> str:
    """A text without some words."""
    return " ".join(word for word in text.split() if word not in words)


def mixed(rows: Sequence[dict[str, Any]], kind: str, copies: int, draw: random.Random) -> list[dict[str, Any]]:
    """Copies of labelled texts of which some have planted words and their label, and some a distractor.

    Args:
        rows: texts with labels 0 and 1.
        kind: one of `KINDS`.
        copies: how often each text is there, each time with other draws.
    """
    found = []
    for row in [row for _ in range(copies) for row in rows]:
        text, label = row["text"], row["label"]
        if draw.random() < PLANTED:
            label = draw.randrange(2)
            text = planted(text, kind, label, draw)
        elif kind != "single" and draw.random() < DISTRACTED:
            text = distracted(text, kind, draw)
        found.append({**row, "id": len(found), "text": text, "label": label})
    return found
