"""A batch as a transformer takes it: token ids, which of them are real, labels."""

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
    """A batch by keyword: a tensor alone is token ids, and what is neither has no keys."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    return batch if isinstance(batch, Mapping) else {}


def token_ids(batch: Any) -> Int[Tensor, "batch token"] | None:
    """The token ids, or None where the batch has embeddings or pixels instead."""
    ids = as_mapping(batch).get("input_ids")
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 else None


def real_tokens(batch: Any) -> Bool[Tensor, "batch token"] | None:
    """Which tokens are real, by `attention_mask`; without one all are. None for inputs that are no tokens.

    Token ids equal to the padding token do not count as padding by themselves: a model attends to them all
    the same.

    Raises:
        BatchError: the attention mask is not one number a token.
    """
    mapping = as_mapping(batch)
    tokens = next((mapping[key] for key in ("input_ids", "inputs_embeds") if mapping.get(key) is not None), None)
    mask = mapping.get("attention_mask")
    if mask is None:
        return None if tokens is None else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise BatchError(
            f"attention_mask is {shape}; which tokens are real is read from a tensor (batch, token). "
            f"Say it yourself: wrap(model, valid=lambda batch: ...)"
        )
    return mask.bool()


def real_targets(batch: Any) -> Bool[Tensor, "batch target"] | None:
    """Which tokens of a decoder beside an encoder are real, by `decoder_attention_mask`; None where there is none."""
    mask = as_mapping(batch).get("decoder_attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def labels(batch: Any) -> Tensor | None:
    """The labels as a tensor, under `labels` or `label`; None where the batch has none."""
    found = next((as_mapping(batch)[key] for key in LABELS if as_mapping(batch).get(key) is not None), None)
    return None if found is None else torch.as_tensor(found)
