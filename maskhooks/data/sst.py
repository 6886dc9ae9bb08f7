"""Film reviews with a sentiment for each word: trees of the Stanford Sentiment Treebank (Socher et al. 2013).

Each line is a tree, `(3 (2 a) (4 gem))`, with labels from 0, very negative, to 4, very positive, for the sentence, its
phrases and its words. The data are at nlp.stanford.edu/sentiment, as trainDevTestTrees_PTB.zip.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskhooks.errors import CorruptFileError
from maskhooks.explanations.tokens import tags_to_pieces

SENTIMENTS = ("very negative", "negative", "neutral", "positive", "very positive")

_LEAF = re.compile(r"\(([0-4]) ([^() ]+)\)")
_WRITTEN = {"-LRB-": "(", "-RRB-": ")", r"\/": "/", r"\*": "*"}
_ESCAPES = re.compile("|".join(map(re.escape, _WRITTEN)))


@dataclass(frozen=True)
class Sentence:
    """A review.

    Attributes:
        text: its words, joined by single spaces.
        label: the sentiment of the sentence, 0 to 4; `SENTIMENTS` has the names.
        words: as in the text; a word can contain a no-break space.
        sentiments: 0 to 4 for each word.
    """

    text: str
    label: int
    words: list[str]
    sentiments: list[int]


def read(path: str | Path) -> list[Sentence]:
    """Return the sentences of a file of trees, in order, with brackets, slashes and asterisks unescaped.

    Raises:
        CorruptFileError: the file is missing or not UTF-8, or a line is not a tree.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would break at other separators too
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{path} cannot be read: {error}. Give a file of trees, such as dev.txt of the Stanford Sentiment Treebank",
            path=path,
        ) from error
    return [_sentence(line.strip(" \r"), path, number) for number, line in enumerate(lines, 1) if line.strip(" \r")]


def piece_sentiments(sentence: Sentence, offsets: Sequence[Sequence[int]]) -> list[int | None]:
    """Return the sentiment of each word piece's word; None for special tokens and padding.

    Args:
        sentence: the sentence that was tokenized.
        offsets: start and end of each piece in the text:
            `tokenizer(sentence.text, return_offsets_mapping=True)["offset_mapping"]`.
    """
    spans, start = [], 0
    for word in sentence.words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return tags_to_pieces(sentence.sentiments, spans, offsets)


def _sentence(line: str, path: str | Path, number: int) -> Sentence:
    leaves = _LEAF.findall(line)
    rest = re.sub(r"\([0-4] ", "", _LEAF.sub("", line))
    whole = re.fullmatch(r"\(([0-4]) .+\)", line)
    if whole is None or not leaves or rest.strip(") ") or line.count("(") != line.count(")"):
        raise CorruptFileError(
            f"{path}: line {number} is not a tree with labels 0 to 4: {line[:60]!r}. Write a tree as "
            f"(3 (2 a) (4 gem)), with brackets in words as -LRB- and -RRB-",
            path=path,
        )
    words = [_ESCAPES.sub(lambda found: _WRITTEN[found[0]], word) for _, word in leaves]
    return Sentence(" ".join(words), int(whole[1]), words, [int(label) for label, _ in leaves])
