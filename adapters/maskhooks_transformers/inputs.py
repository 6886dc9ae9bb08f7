"""Reads a transformer's batch: token ids, which of them are valid, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from maskhooks.errors import BatchError

LABELS = ("labels", "label")
IGNORED = -100  # the label of positions that do not count, throughout transformers


def as_mapping(batch: Any) -> Mapping[str, Any]:
    """The batch as a mapping: a tensor alone is token ids; anything else has no keys."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    return batch if isinstance(batch, Mapping) else {}


def token_ids(batch: Any) -> Int[Tensor, "batch token"] | None:
    """The token ids, or None if the batch has embeddings or pixels instead."""
    ids = as_mapping(batch).get("input_ids")
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 else None


def valid_tokens(batch: Any) -> Bool[Tensor, "batch token"] | None:
    """Which tokens are valid, by `attention_mask`; without one all are. None for inputs that are not tokens.

    Token ids equal to the padding token do not count as padding by themselves: the model still attends to them.

    Raises:
        BatchError: the attention mask is not one number per token.
    """
    mapping = as_mapping(batch)
    tokens = next((mapping[key] for key in ("input_ids", "inputs_embeds") if mapping.get(key) is not None), None)
    mask = mapping.get("attention_mask")
    if mask is None:
        return None if tokens is None else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise BatchError(
            f"attention_mask is {shape}, and a tensor (batch, token) is needed to say which tokens are valid. "
            f"Give wrap(model, valid=lambda batch: ...)"
        )
    return mask.bool()


def valid_targets(batch: Any) -> Bool[Tensor, "batch target"] | None:
    """Which decoder tokens of an encoder-decoder are valid, by `decoder_attention_mask`; None if there is none."""
    mask = as_mapping(batch).get("decoder_attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def labels(batch: Any) -> Tensor | None:
    """The batch's `labels` or `label` as a tensor; None if it has neither."""
    found = next((as_mapping(batch)[key] for key in LABELS if as_mapping(batch).get(key) is not None), None)
    return None if found is None else torch.as_tensor(found)
