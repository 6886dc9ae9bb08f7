"""Prompts and continuations for tiny language models, padded on either side."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import maskhooks
from maskhooks import Hooked
from tests.adapters.transformers_models import HIDDEN, PAD, SEP, WORDS, make, tokenizer

TEXTS = ["word4 word5 word6 word7", "word8 word9"]
ENDS = ["word10", "word11 word12 word13"]
FAMILIES = ["gpt2", "llama", "t5"]


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=HIDDEN,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=SEP,
        decoder_start_token_id=PAD,
    )
    model: PreTrainedModel = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():  # larger than initialised, so that values differ visibly
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.train()


def hook(family: str, **settings: Any) -> Hooked:
    model = t5() if family == "t5" else make(family, "CausalLM")
    return maskhooks.wrap(model, **{"tokenizer": tokenizer(), **settings})


def left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch, padded on the left."""
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        key: torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)]) for key, value in batch.items()
    }


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One example without padding."""
    valid = batch["attention_mask"][row].bool()
    return {key: value[row : row + 1, valid] for key, value in batch.items()}
