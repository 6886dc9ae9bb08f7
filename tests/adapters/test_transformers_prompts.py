"""Batches of prompts: texts, token ids, chats and continuations, and what is no prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from maskhooks_transformers.prompts import Prompts
from torch import Tensor

import maskhooks
from maskhooks.errors import BatchError, SettingError
from tests.adapters.transformers_models import CLS, FIRST, HIDDEN, PAD, SEP, make, tokenizer
from tests.adapters.transformers_prompts import ENDS, TEXTS, hook

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}word5{% endif %}"
)


def test_a_batch_of_prompts() -> None:
    batch = Prompts(hook("gpt2"))(TEXTS)
    assert batch["input_ids"].tolist() == [[CLS, 4, 5, 6, 7], [CLS, 8, 9, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "given", [ENDS, [[10], torch.tensor([11, 12, 13])], torch.tensor([[10, SEP, PAD], [11, 12, 13]])]
)
def test_a_batch_of_prompts_and_continuations(given: Any) -> None:
    hooked = hook("gpt2")
    batch = Prompts(hooked)(TEXTS, given)
    first = [10, SEP] if isinstance(given, Tensor) else [10]
    labels = [row[row != -100].tolist() for row in batch["labels"]]
    assert labels == [first, [11, 12, 13]]
    assert batch["input_ids"][0, : 5 + len(first)].tolist() == [CLS, 4, 5, 6, 7, *first]
    assert batch["input_ids"][1, :6].tolist() == [CLS, 8, 9, 11, 12, 13]
    where = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][where], batch["labels"][where])
    assert batch["attention_mask"].sum(1).tolist() == [5 + len(first), 6]
    assert hooked.task.targets(batch) == [" ".join(["word10", "[SEP]"][: len(first)]), "word11 word12 word13"]


def test_a_batch_for_an_encoder_decoder() -> None:
    hooked = hook("t5")
    batch = Prompts(hooked)(TEXTS, ENDS)
    assert batch["input_ids"].tolist() == [[CLS, 4, 5, 6, 7, SEP], [CLS, 8, 9, SEP, PAD, PAD]]
    assert batch["labels"].tolist() == [[CLS, 10, SEP, -100, -100], [CLS, 11, 12, 13, SEP]]
    assert batch["decoder_input_ids"].tolist() == [[PAD, CLS, 10, SEP, PAD], [PAD, CLS, 11, 12, 13]]
    assert batch["decoder_attention_mask"].sum(1).tolist() == [3, 5]
    assert hooked.task.targets(batch) == ["[CLS] word10 [SEP]", "[CLS] word11 word12 word13 [SEP]"]
    encoder, decoder = (hooked.sites.tagged(side)[0] for side in ("encoder", "decoder"))
    assert hooked.task.valid(encoder, batch, torch.zeros(2, 6, HIDDEN)).sum(1).tolist() == [6, 4]
    assert hooked.task.valid(decoder, batch, torch.zeros(2, 5, HIDDEN)).sum(1).tolist() == [3, 5]
    assert set(Prompts(hooked)(TEXTS)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("text", ["word4 word5", [CLS, 4, 5], torch.tensor([CLS, 4, 5])])
def test_a_prompt_is_a_text_or_token_ids(text: Any) -> None:
    assert Prompts(hook("llama"))([text])["input_ids"].tolist() == [[CLS, 4, 5]]


def test_a_text_and_its_continuation_are_read_together() -> None:
    """Tokenised alone a continuation may become other tokens; what counts is what the model would read."""

    class Seams:
        """Characters, but `ab` is a token of its own, and a text begins with an underscore."""

        pad_token_id, all_special_ids = 0, (0,)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            text = f"_{text}"
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text.replace("ab", "@")]}

    prompts = Prompts(hook("gpt2", tokenizer=Seams()))
    prompts.words.config.max_position_embeddings = 24

    def read(text: str, end: str) -> list[str]:
        batch = prompts([text], [end])
        known = batch["labels"][0] != -100
        return ["".join(map(chr, batch["input_ids"][0][own].tolist())) for own in (~known, known)]

    assert read("x", "y") == ["\x01_x", "y"]
    assert read("xa", "by") == ["\x01_xa", "_by"]  # one token over the seam: each as it is alone


def test_a_chat_goes_through_the_template() -> None:
    own = tokenizer()
    own.chat_template = CHAT
    prompts = Prompts(hook("llama", tokenizer=own))
    chat = [{"role": "word4", "content": "word8 word9"}, {"role": "word6", "content": "word7"}]
    batch = prompts([chat], ["word10"])
    assert batch["input_ids"].tolist() == [[4, 8, 9, 6, 7, 5, 10]]
    assert batch["labels"].tolist() == [[-100] * 6 + [10]]


def test_long_prompts() -> None:
    """What the model has no positions for is refused; where it may be cut, the end of a prompt stays."""
    hooked, long = hook("gpt2"), " ".join(f"word{index}" for index in range(FIRST, 34))
    with pytest.raises(BatchError, match=r"prompt 1 has 31 tokens and its continuation 1, .* for 24\..*max_length=24"):
        Prompts(hooked)(["word4", long], ["word5", "word6"])
    batch = Prompts(hooked, max_length=6)(["word4", long], ["word5", "word6 word7"])
    assert batch["input_ids"].tolist() == [[CLS, 4, 5, PAD, PAD, PAD], [CLS, 31, 32, 33, 6, 7]]
    with pytest.raises(BatchError, match=r"continuation 0 has 6 tokens, .* no room"):
        Prompts(hooked, max_length=6)(["word4"], [[9] * 6])
    encoded = Prompts(hook("t5"), max_length=4)([long], ["word6"])
    assert encoded["input_ids"].tolist() == [[CLS, 4, 5, SEP]]


def test_what_is_no_prompt() -> None:
    prompts = Prompts(hook("gpt2"))
    with pytest.raises(BatchError, match=r"continuation 1 is empty. Give at least one token"):
        prompts(TEXTS, ["word4", ""])
    with pytest.raises(BatchError, match="prompt 0 is empty"):
        prompts([[]])
    with pytest.raises(BatchError, match="2 prompts and 1 continuations"):
        prompts(TEXTS, ["word4"])
    with pytest.raises(BatchError, match="0 prompts and no continuations"):
        prompts([])
    with pytest.raises(BatchError, match="chat template, and this one has none"):
        prompts([[{"role": "user", "content": "word4"}]])
    bare = Prompts(maskhooks.wrap(make("gpt2", "CausalLM")))
    with pytest.raises(BatchError, match=r"a text needs a tokenizer.*wrap\(model, tokenizer=tokenizer\)"):
        bare(["word4"])
    assert bare([[4, 5]], [[6]])["input_ids"].tolist() == [[4, 5, 6]]
    with pytest.raises(SettingError, match=r"BertForSequenceClassification .* AutoModelForCausalLM"):
        Prompts(maskhooks.wrap(make("bert")))
    with pytest.raises(SettingError, match="max_length is 1"):
        Prompts(hook("gpt2"), max_length=1)
