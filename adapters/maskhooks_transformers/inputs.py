"""Reads a transformer's batch: token ids, which of them are valid, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from maskhooks.errors import BatchError
from maskhooks.model.task import as_bool

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
    if bool((mask < 0).any()) or bool(mask.isnan().any()):  # whole numbers above 1 may tell packed texts apart
        return as_bool(mask, "attention_mask")
    return mask.bool()


def valid_targets(batch: Any) -> Bool[Tensor, "batch target"] | None:
    """Which decoder tokens of an encoder-decoder are valid, by `decoder_attention_mask`; None if there is none."""
    mask = as_mapping(batch).get("decoder_attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def labels(batch: Any) -> Tensor | None:
    """The batch's `labels` or `label` as a tensor; None if it has neither."""
    found = next((as_mapping(batch)[key] for key in LABELS if as_mapping(batch).get(key) is not None), None)
    return None if found is None else torch.as_tensor(found)


def without_tokens(batch: Any, removed: Bool[Tensor, "batch token"]) -> dict[str, Any]:
    """The batch without some tokens, the others moved together; padding stays on its side, no more than is needed.

    Every entry with a number per token is moved along, but positions, which the model then counts anew.

    Raises:
        BatchError: nothing would be left of an example.
    """
    mapping, ids, valid = as_mapping(batch), token_ids(batch), valid_tokens(batch)
    assert ids is not None
    assert valid is not None
    kept = valid & ~removed.to(valid.device)
    left = kept.sum(1)
    if not bool(left.all()):
        raise BatchError(
            f"nothing is left of example {int((left == 0).nonzero()[0])} of the batch without its tokens. Remove a "
            "smaller share, or replace tokens instead: operator='mask' or 'baseline'"
        )
    at_end = bool((valid[:, -1] | ~valid.any(1)).all()) and not bool(valid.all())  # padding on the left
    order = kept.int().argsort(dim=1, stable=True, descending=not at_end)
    order = order[:, -int(left.max()) :] if at_end else order[:, : int(left.max())]
    found: dict[str, Any] = {"attention_mask": valid}
    found.update({key: value for key, value in mapping.items() if key != "position_ids"})
    for key, value in found.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            moved = value.gather(
                1, order.view(*order.shape, *[1] * (value.dim() - 2)).expand(*order.shape, *value.shape[2:])
            )
            here = kept.gather(1, order)
            found[key] = here.to(value.dtype) if key == "attention_mask" else moved
            if key == "labels":
                found[key] = moved.masked_fill(~here, IGNORED)
    return found
