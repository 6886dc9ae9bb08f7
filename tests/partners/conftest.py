"""Models for tests with partners: tiny, from configurations, without a network; a check of what gates do."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[[], Any]:
    """Makes a tokenizer of the words w4 to w39, read from a folder, as partners want it."""

    def make() -> Any:
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        special = ["<pad>", "<bos>", "<eos>", "<unk>"]
        ids = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(4, 40))])}
        words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        names = dict(zip(["pad_token", "bos_token", "eos_token", "unk_token"], special, strict=True))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "words")
        return transformers.AutoTokenizer.from_pretrained(tmp_path / "words")

    return make
