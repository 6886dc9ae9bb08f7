"""The rules that `tiny.py` tries in turn to shrink the sizes of a configuration.

The first rules shrink sizes by the patterns of their names, first leaving None alone, then filling it in; the next
divide all sizes by the same number; the last only reduce layers, words and experts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any

WORDS = 96
LAYERS = 2

# The size that a name asks for, by the first pattern found in the name. 0: not a size, or left unchanged.
_NAMES: tuple[tuple[str, int], ...] = (
    (r"indexer_kv_heads", 1),
    (r"indexer_budget|indexer_compress_ratio", 4),
    (r"layerdrop|tokenizer_chunk|eps|epsilon|dropout|factor|_act|scale|std|theta|prob|mult|ratio|group_size_", 0),
    (r"token_id|token_index|_id$", 0),
    (r"vocab_size|_vocab$", WORDS),
    (r"n_group$|topk_group", 1),
    (r"(n|o)_groups$", 2),
    (r"experts_per|top_?k|moe_k|num_selected", 2),
    (r"experts|expert_num", 4),
    (r"(key_value|kv|_groups_)_?heads|num_kv|n_head_kv|multi_query_group", 2),
    (r"heads?$|n_head|num_heads|_heads", 4),
    (r"layers_per|num_hidden_groups|inner_group|layer_offset", 1),
    (r"layer_period", 2),
    (r"layers$|n_layers?$|num_layers|layers_num|^depth$|num_blocks|n_blocks|block_depth|attends_per|repeats$", LAYERS),
    (r"first_k_dense|num_dense|dense_layers", 1),
    (r"positions?$|position_embeddings|max_length|max_seq|^n_ctx$|seq_len(gth)?$", 64),
    (r"image_size|input_size|crop_size", 32),
    (
        r"(head|key|value|qk|rope|nope|kv|v)_?(head)?_(dim|channels)$|^d_kv$|d_head|kv_channels|head_size|attention_key",
        8,
    ),
    (r"lora_rank|low_rank|_rank$", 16),
    (r"state_size|d_state|ssm_state", 8),
    (r"^window_size$|num_filters|right_context", 2),
    (r"chunk_size$|window_size|sliding_window|attention_window|block_size|chunk_length", 8),
    (r"intermediate|ffn|feed_forward|d_ff|d_ssm|n_inner|mlp_hidden|inner_dim|ff_dim|expert_dim", 64),
    (
        r"embedding_size|embed_dim|emb_dim|hidden|d_model|n_embd|^dim$|_dim$|model_dim|width|embed_size|channels?_out|^d_latents$",
        32,
    ),
    (r"coordinate_size|shape_size|channels$", 32),
    (r"projection_size|proj_size|d_embed|lru_width|output_size|conv_hidden|size_per_layer|codevector_dim", 32),
    (r"num_buckets|max_distance|num_codevectors|relative_attention", 16),
)

Rung = Callable[[str, Any, Any], Any]  # a size's name, its value, and the class's default


def rungs() -> Iterator[Rung]:
    """The rules, starting with those that change least."""
    yield functools.partial(_by_name, derived=False)
    yield functools.partial(_by_name, derived=True)
    yield functools.partial(_by_name, derived=True, fill=True)
    yield _of_wider_heads
    yield _attending
    yield _of_more_pixels
    yield _of_more_words
    yield functools.partial(_deep, derived=False, layers=8)
    yield functools.partial(_deep, derived=True, layers=8)
    yield functools.partial(_deep, derived=False, layers=32)
    for divisor in (16, 8, 4):
        yield functools.partial(_divided, divisor=divisor)
    yield _as_decoder
    yield _fewer
    yield _layers_only
    yield _decoding


def named(name: str, pattern: str) -> bool:
    """Whether a name contains a pattern."""
    return re.search(pattern, name) is not None


def number_of(name: str) -> int:
    """The size that a name asks for; 0 if it is not a size."""
    return next((size for pattern, size in _NAMES if named(name, pattern)), 0)


def _by_name(name: str, value: Any, default: Any, *, derived: bool, fill: bool = False) -> Any:
    """Shrink sizes by their names.

    Args:
        derived: also those that the class derives from others by default.
        fill: also those that are None.
    """
    size = number_of(name)
    if named(name, r"kv_shared_layers") and type(value) is int:
        return 0  # with two layers, none shares the keys of an earlier one
    if not size or isinstance(value, (bool, str)) or (isinstance(default, (str, NoneType)) and not derived):
        return value
    if value is None:
        return size if fill and not named(name, r"window|chunk|shared(?!_expert)|block|rank|^n_inner") else value
    if isinstance(value, int):
        return min(value, size) if value > 0 else value
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        if named(name, r"depths|layers|num_blocks|repeats"):
            return type(value)(min(item, 2) for item in value)
        if named(name, r"heads"):
            return type(value)(min(item, 2) for item in value)
        if named(name, r"hidden_sizes|embed_dims?|dims?$|channels|hidden_size"):
            return type(value)(max(8, item // 8 * 8 // 4 // 8 * 8) for item in value)
        if named(name, r"image_size|input_size"):
            return type(value)(min(item, size) for item in value)
    return value


def _of_wider_heads(name: str, value: Any, default: Any) -> Any:
    """Like `_by_name`, but with heads that are together twice as wide as a state, as in state-space layers."""
    new = _by_name(name, value, default, derived=False)
    return min(value, 16) if type(value) is int and number_of(name) == 8 and named(name, r"head_?dim|d_head") else new


def _attending(name: str, value: Any, default: Any) -> Any:
    """Like `_by_name`, but with attention in the last layer, for classes that have none by default."""
    if name == "layer_types":
        return [(value or ["full_attention"])[0], "full_attention"]
    if named(name, r"layer_indices$") and value is None:
        return [LAYERS - 1]
    return _by_name(name, value, default, derived=False)


def _of_more_pixels(name: str, value: Any, default: Any) -> Any:
    """Like `_by_name`, but with images twice as wide, so that windows still fit at the last stage."""
    new = _by_name(name, value, default, derived=False)
    return min(value, 64) if type(value) is int and named(name, r"image_size") else new


def _of_more_words(name: str, value: Any, default: Any) -> Any:
    """Like `_by_name`, but with enough words for models that use fixed token ids."""
    words = type(value) is int and number_of(name) == WORDS
    return min(value, 16384) if words else _by_name(name, value, default, derived=False)


def _deep(name: str, value: Any, default: Any, *, derived: bool, layers: int) -> Any:
    """Like `_by_name`, but with more layers, for kinds of layers that occur rarely."""
    if number_of(name) == LAYERS:
        return min(value, layers) if type(value) is int else value
    return _by_name(name, value, default, derived=derived)


def _as_decoder(name: str, value: Any, default: Any) -> Any:
    """Like `_divided`, for classes that must be configured as decoders."""
    return True if name == "is_decoder" else _divided(name, value, default, divisor=16)


def _divided(name: str, value: Any, default: Any, *, divisor: int) -> Any:
    """Divide all widths by the same number, so that they still fit each other."""
    if named(name, r"depths"):
        return type(value)(min(item, 2) for item in value) if isinstance(value, (list, tuple)) else value
    size = number_of(name)
    if size in (32, 64, 8, 16) and not named(
        name, r"positions?$|position_emb|image|input_size|max_|window|chunk|block|^n_ctx"
    ):
        if type(value) is int and value >= 8 * divisor:
            return value // divisor
        if isinstance(value, (list, tuple)) and all(type(item) is int and item >= 4 * divisor for item in value):
            return type(value)(item // divisor for item in value)
        return value
    return _fewer(name, value, default)


def _fewer(name: str, value: Any, default: Any) -> Any:
    """Reduce layers, words, experts, positions and pixels; keep widths."""
    if named(name, r"depths|repeats$") and isinstance(value, (list, tuple)):
        return type(value)(1 for _ in value)
    if named(
        name, r"vocab_size|layers$|n_layers?$|num_layers|experts$|positions?$|position_embeddings|image_size|^n_ctx"
    ):
        return _by_name(name, value, default, derived=True)
    return value


def _decoding(name: str, value: Any, default: Any) -> Any:
    """Like `_as_decoder`, but with a smaller divisor."""
    return True if name == "is_decoder" else _divided(name, value, default, divisor=4)


def _layers_only(name: str, value: Any, default: Any) -> Any:
    """Like `_fewer`, but with all experts, positions and pixels."""
    if named(name, r"vocab_size|layers$|n_layers?$|num_layers"):
        return _by_name(name, value, default, derived=True)
    return value
