"""The Stanford Sentiment Treebank: trees read as sentences, and the sentiment of each tokenizer's pieces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskhooks.data.sst import SENTIMENTS, Sentence, piece_sentiments, read
from maskhooks.errors import CorruptFileError

TREE = r"(1 (2 (2 A) (1 (0 bad) (2 8\/10))) (2 (2 -LRB-) (2 (3 (2 x) (4 don't)) (2 (2 \*) (2 -RRB-)))))"


def written(folder: Path, *lines: str) -> Path:
    path = folder / "trees.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_tree_is_a_sentence(tmp_path: Path) -> None:
    (found,) = read(written(tmp_path, TREE))
    assert found == Sentence(
        "A bad 8/10 ( x don't * )", 1, ["A", "bad", "8/10", "(", "x", "don't", "*", ")"], [2, 0, 2, 2, 2, 4, 2, 2]
    )
    assert SENTIMENTS[found.sentiments[1]] == "very negative"


def test_words_end_at_ascii_blanks_alone(tmp_path: Path) -> None:
    first, second = read(written(tmp_path, "(3 (2 8\xa01\\/2) (4 good\u2028x))\r", "", "(4 Great)", ""))
    assert first.words == ["8\xa01/2", "good\u2028x"]
    assert first.text == "8\xa01/2 good\u2028x"
    assert (second.text, second.label, second.sentiments) == ("Great", 4, [4])


@pytest.mark.parametrize(
    "line",
    ["a plain text", "(7 (2 a) (2 b))", "(2 (2 a) (2 b)", "(2 (2 a) b)", "(2 )", "positive\tA film .", "((2 a))"],
)
def test_a_line_that_is_no_tree_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, "(2 (2 a) (2 b))", line)
    with pytest.raises(CorruptFileError, match=r"line 2 is not a tree.*-LRB-") as caught:
        read(path)
    assert caught.value.path == path


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="cannot be read"):
        read(tmp_path / "dev.txt")


def test_pieces_have_the_sentiment_of_their_word(tmp_path: Path) -> None:
    (found,) = read(written(tmp_path, TREE))
    pieces = ["", "A", "ba", "d", "8", "/", "10", "(", "x", "don", "'", "t", "*", ")", "", ""]
    offsets, end = [], 0
    for piece in pieces:
        start = found.text.index(piece, end) if piece else 0
        offsets.append((start, start + len(piece)))
        end = max(end, start + len(piece))
    expected = [None, 2, 0, 0, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, None, None]
    assert piece_sentiments(found, offsets) == expected


def test_offsets_of_a_bert_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] a bad / ( x don ' t * ) ##d ba 8 10"
    (tmp_path / "vocab.txt").write_text(vocabulary.replace(" ", "\n"), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    (found,) = read(written(tmp_path, TREE))
    encoded = tokenizer(found.text, return_offsets_mapping=True, padding="max_length", max_length=16)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    sentiments = dict(zip(tokens, piece_sentiments(found, encoded["offset_mapping"]), strict=True))
    assert sentiments["bad"] == 0
    assert sentiments["don"] == sentiments["'"] == sentiments["t"] == 4
    assert sentiments["/"] == sentiments["("] == 2
    assert sentiments["[CLS]"] is sentiments["[SEP]"] is sentiments["[PAD]"] is None


def test_the_treebank_itself() -> None:
    folder = Path(os.environ.get("MASKHOOKS_DATA", "")) / "data" / "sst"
    if "MASKHOOKS_DATA" not in os.environ or not (folder / "dev.txt").exists():
        pytest.skip("no data/sst/dev.txt in the folder named by MASKHOOKS_DATA")
    found = read(folder / "dev.txt")
    assert len(found) == 1101
    assert [sum(one.label == label for one in found) for label in range(5)] == [139, 289, 229, 279, 165]
    assert sum(len(one.words) for one in found) / len(found) == pytest.approx(19.3, abs=0.05)
