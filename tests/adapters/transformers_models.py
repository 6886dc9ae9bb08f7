"""Tiny random transformers of many families, batches for them, and a tokenizer of their words."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LAYERS, HIDDEN, WORDS = 3, 16, 40
PAD, CLS, SEP, MASK, FIRST = 0, 1, 2, 3, 4

_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": PAD,
    "bos_token_id": CLS,
    "eos_token_id": SEP,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

# transformers' name of a kind of model, and what its configuration needs besides
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"max_position_embeddings": 30}),
    "distilbert": ("distilbert", {"hidden_dim": 32}),
    "electra": ("electra", {"embedding_size": 8}),
    "deberta-v2": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deberta-v2 with a convolution": ("deberta-v2", {"conv_kernel_size": 3}),
    "albert": ("albert", {"embedding_size": 8}),
    "albert in two groups": ("albert", {"embedding_size": 8, "num_hidden_groups": 2, "num_hidden_layers": 4}),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local", "global"], 1]], "num_layers": LAYERS}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 8}),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED),
}
FAMILIES = {**ENCODERS, **DECODERS}


def config(family: str, **settings: Any) -> Any:
    kind, own = FAMILIES[family]
    return transformers.AutoConfig.for_model(kind, **{**_SIZES, **own, **settings})


def make(family: str, head: str = "SequenceClassification", **settings: Any) -> PreTrainedModel:
    """A tiny model with one of transformers' heads, or `"Model"`; training, every other weight frozen."""
    auto = transformers.AutoModel if head == "Model" else getattr(transformers, f"AutoModelFor{head}")
    model: PreTrainedModel = auto.from_config(config(family, **settings))
    with torch.no_grad():
        for weight in model.parameters():  # larger than initialised, so that values differ visibly
            weight.add_(torch.randn_like(weight).to(weight.dtype) * 0.1)
    for weight in list(model.parameters())[::2]:
        weight.requires_grad_(False)
    return model.train()


def depth(model: PreTrainedModel) -> int:
    return int(model.config.num_hidden_layers)


def batch(*, left: bool = False, **more: Any) -> dict[str, Tensor]:
    """Three sentences of lengths 7, 4 and 5, padded on the right or on the left."""
    generator = torch.Generator().manual_seed(5)
    rows, masks = [], []
    for length in (7, 4, 5):
        words = torch.randint(FIRST, WORDS, (length - 2,), generator=generator).tolist()
        row, padding = [CLS, *words, SEP], 7 - length
        rows.append([PAD] * padding + row if left else row + [PAD] * padding)
        masks.append([0] * padding + [1] * length if left else [1] * length + [0] * padding)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks), **more}


REAL = batch()["attention_mask"].bool()


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}
    words = {f"word{index}": index for index in range(FIRST, WORDS)}
    inner = Tokenizer(WordLevel({**special, **words}, unk_token="[MASK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


class Counter:
    """Counts the calls of modules' own forward."""

    def __init__(self, *modules: nn.Module) -> None:
        self.calls = 0
        for module in modules:
            module.forward = self._counted(module.forward)  # type: ignore[method-assign]

    def _counted(self, forward: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return forward(*args, **kwargs)

        return counted
