"""Decoding: what a call of a language model needs besides its batch, and what a tap does while one generates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from maskhooks.errors import ReplacementError


def without_cache(model: nn.Module) -> dict[str, bool]:
    """`use_cache=False` for a model that takes it, or hands it on to a base model that does.

    A classifier over an encoder-decoder that does not take it (T5Gemma's) says so to its base itself.
    """
    own = inspect.signature(model.forward).parameters
    base = inspect.signature(getattr(model, "base_model", model).forward).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        hands_on = False
    return {"use_cache": False} if "use_cache" in own or (hands_on and "use_cache" in base) else {}


def positions(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Int[Tensor, "batch token"]]:
    """`position_ids` that begin at each example's first real token, where padding stands in front of it.

    Empty where nothing stands in front, where they are given, and for models that take none or find their own.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, :1].all()) or "position_ids" in kwargs:
        return {}
    if "position_ids" not in inspect.signature(model.forward).parameters or any(
        hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()
    ):
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def target(
    model: nn.Module, kwargs: Mapping[str, Any], main: Tensor, labels: Tensor | None
) -> dict[str, Int[Tensor, "batch target"]]:
    """`decoder_input_ids` for an encoder-decoder that was given none: its labels shifted, else the start alone.

    Args:
        main: what the encoder takes, batch first.
    """
    if any(key in kwargs for key in ("decoder_input_ids", "decoder_inputs_embeds")):
        return {}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is not None and labels.dim() == 2 and shift is not None:
        return {"decoder_input_ids": shift(labels=labels)}
    start = start_token(model)
    return {} if start is None else {"decoder_input_ids": torch.full((len(main), 1), start, device=main.device)}


def start_token(model: nn.Module) -> int | None:
    """The token with which a decoder begins."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for key in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(config, key, None)
            if isinstance(found, int):
                return found
    return None


class OnPrompt:
    """A replacement that changes the prompt's tokens while a model generates, and leaves new tokens as they are.

    `generate` runs the model once on the prompt, and then on each new token alone (with a key-value cache) or on all
    tokens so far (without). The prompt's part of a value is changed wherever it is there; with a cache that is once,
    and what later layers made of it stays in the cache.

    Args:
        replacement: from a value at the prompt's tokens, batch and token first, to one like it.
        length: tokens of the prompt, padding on the left included.
    """

    def __init__(self, replacement: Callable[[Tensor], Tensor], length: int) -> None:
        self.replacement, self.length = replacement, length
        self._seen = False

    def __call__(self, value: Tensor) -> Tensor:
        """The changed value.

        Raises:
            ReplacementError: the prompt comes in pieces, or is another one.
        """
        tokens = value.shape[1]
        if tokens < self.length and (tokens > 1 or not self._seen):
            raise ReplacementError(
                f"a value of {tokens} tokens came where the prompt's {self.length} were due, so which of them it holds "
                "cannot be told. Give OnPrompt the prompt's length with its padding, and generate without "
                "prefill_chunk_size and assistant models"
            )
        if tokens < self.length:
            return value
        self._seen = True
        return torch.cat([self.replacement(value[:, : self.length]), value[:, self.length :]], 1)
