"""Word pieces gated together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import BatchEncoding, PreTrainedTokenizerFast

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.errors import SettingError
from maskhooks.explainers.random import Random
from tests.adapters.transformers_models import make

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "un",
    "##good",
    "##ness",
    "films",
    ".",
    "a",
    "b",
    "c",
    "d",
]
WORDS = [[0, 1, 1, 1, 2, 3, 4], [0, 1, 2, 3, 3, 4, 5]]
QUICK = dataclasses.replace(Recipe(), steps=3, baseline_steps=1)
FREE = dataclasses.replace(QUICK, steps=20, warmup_steps=1, logit_learning_rate=0.3)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordPiece({piece: index for index, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )


@pytest.fixture
def batch(tokenizer: PreTrainedTokenizerFast) -> BatchEncoding:
    texts = ["[CLS] ungoodness films . [SEP]", "[CLS] films a ungood . [SEP]"]
    return tokenizer(texts, padding=True, return_tensors="pt")


def test_the_words_of_tokens(tokenizer: PreTrainedTokenizerFast, batch: BatchEncoding) -> None:
    hooked = maskhooks.wrap(make("bert", "SequenceClassification"), tokenizer=tokenizer, units="words")
    site = hooked.find("input")[0]
    assert hooked.task.units(site, batch, {str(site): torch.zeros(2, 7, 16)}).tolist() == WORDS
    alone = maskhooks.wrap(make("bert", "SequenceClassification"), tokenizer=tokenizer)
    assert alone.task.units(site, batch, {str(site): torch.zeros(2, 7, 16)}) is None


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("kind", ["random", "free", "amortised"])
def test_pieces_of_a_word_have_one_score(tokenizer: PreTrainedTokenizerFast, batch: BatchEncoding, kind: str) -> None:
    hooked = maskhooks.wrap(make("bert", "SequenceClassification"), tokenizer=tokenizer, units="words")
    if kind == "random":
        explanation = Random(hooked, "input").explain(batch)
    elif kind == "free":
        explanation = DiffMask(hooked, "input", amortized=False, margin=0.001, recipe=FREE).explain(batch)
    else:
        explainer = DiffMask(hooked, "hidden", margin=50.0, recipe=QUICK)
        explanation = explainer.fit([batch], progress=False, accelerator="cpu").explain(batch)
    assert explanation["label"][:5].tolist() == ["[CLS]", "un", "##good", "##ness", "films"]
    for site in set(explanation["site"]):
        for example, words in enumerate(WORDS):
            rows = explanation.select(site=site, example=example, valid=None)
            scores = rows["score"]
            found = {number: set(scores[np.array(words) == number].tolist()) for number in set(words)}
            assert all(len(values) == 1 for values in found.values())
            assert len(set.union(*found.values())) > 1


def test_heads_have_gates_of_their_own_in_each_word(tokenizer: PreTrainedTokenizerFast, batch: BatchEncoding) -> None:
    hooked = maskhooks.wrap(make("bert", "SequenceClassification"), tokenizer=tokenizer, units="words")
    explanation = Random(hooked, "head").explain(batch)
    first = explanation.select(example=0, site=explanation["site"][0], valid=None)
    scores = first["score"].reshape(7, -1)
    assert (scores[1] == scores[3]).all()
    assert scores[1][0] != scores[1][1]


def test_what_cannot_be(tokenizer: PreTrainedTokenizerFast, batch: BatchEncoding) -> None:
    model = make("bert", "SequenceClassification")
    with pytest.raises(SettingError, match="Give 'words', or a function"):
        maskhooks.wrap(model, units="sentences")
    with pytest.raises(SettingError, match="units='words' needs a tokenizer"):
        Random(maskhooks.wrap(model, units="words"), "input").explain(batch)
