"""Arguments that a call of a language model needs besides its batch, and replacements while it generates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from maskhooks.errors import ReplacementError


def without_cache(model: nn.Module) -> dict[str, bool]:
    """`use_cache=False` for a model that takes it, or passes it to a base model that does.

    A classifier over an encoder-decoder that does not take it (T5Gemma's) already passes it to its base.
    """
    own = inspect.signature(model.forward).parameters
    base = inspect.signature(getattr(model, "base_model", model).forward).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        hands_on = False
    return {"use_cache": False} if "use_cache" in own or (hands_on and "use_cache" in base) else {}


def positions(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Int[Tensor, "batch token"]]:
    """`position_ids` that start at each example's first valid token, if padding precedes it.

    Empty without left padding, if they are given, and for models that take none or compute their own.
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
    """`decoder_input_ids` for an encoder-decoder that got none: its labels shifted, or else the start token alone.

    Args:
        main: the encoder's input, batch first.
    """
    if any(key in kwargs for key in ("decoder_input_ids", "decoder_inputs_embeds")):
        return {}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is not None and labels.dim() == 2 and shift is not None:
        return {"decoder_input_ids": shift(labels=labels)}
    start = start_token(model)
    return {} if start is None else {"decoder_input_ids": torch.full((len(main), 1), start, device=main.device)}


def start_token(model: nn.Module) -> int | None:
    """The token that a decoder starts with."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for key in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(config, key, None)
            if isinstance(found, int):
                return found
    return None


class OnPrompt:
    """A replacement that changes the prompt's tokens while a model generates, and leaves new tokens unchanged.

    `generate` runs the model once on the prompt, then on each new token alone (with a key-value cache) or on all tokens
    so far (without). The prompt's part of a value is changed in every run that has it; with a cache that is one run,
    and the cache keeps what later layers computed from it.

    Args:
        replacement: maps a value at the prompt's tokens, batch and token first, to one of the same shape.
        length: the prompt's number of tokens, left padding included.
    """

    def __init__(self, replacement: Callable[[Tensor], Tensor], length: int) -> None:
        self.replacement, self.length = replacement, length
        self._seen = False

    def __call__(self, value: Tensor) -> Tensor:
        """Return the changed value.

        Raises:
            ReplacementError: the prompt arrives in pieces, or has another length.
        """
        tokens = value.shape[1]
        if tokens < self.length and (tokens > 1 or not self._seen):
            raise ReplacementError(
                f"a value has {tokens} tokens where the prompt's {self.length} were expected, so it is unknown which "
                "ones it holds. Give OnPrompt the prompt's length with its padding, and generate without "
                "prefill_chunk_size and assistant models"
            )
        if tokens < self.length:
            return value
        self._seen = True
        return torch.cat([self.replacement(value[:, : self.length]), value[:, self.length :]], 1)
