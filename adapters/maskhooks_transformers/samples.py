"""Small sample calls for a transformer, from its kind of input and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, DECODED = 5, 7, 6
_OBJECTS = 3
_WAVE = 4000  # a quarter of a second at 16 kHz


def calls(model: nn.Module, batch: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Sample calls to try in turn, tensors of zeros (masks of ones): the main input and its companions."""
    config: Any = getattr(model, "config", None)
    takes = set(inspect.signature(model.forward).parameters)
    beside = _beside(takes, config, batch)
    main = str(getattr(model, "main_input_name", "input_ids"))
    hands_on = "kwargs" in takes or "args" in takes
    first = ["input_ids", main] if main == "inputs" else [main, "input_ids"]  # "inputs" may be of any kind
    if {"pixel_values", "spatial_shapes"} <= takes:
        yield _patches(config, batch)
    for name in dict.fromkeys([*first, "pixel_values", "input_values", "input_features", "inputs"]):
        if name not in takes and not (hands_on and name == main):
            continue
        for tensor in _inputs(name, config, batch):
            own = {name: tensor}
            if name in ("input_ids", "inputs") and "attention_mask" in takes:
                own["attention_mask"] = torch.ones(tensor.shape, dtype=torch.long)
            if "decoder_input_ids" in takes and _is_encoder_decoder(config):
                yield {**own, "decoder_input_ids": torch.zeros(batch, DECODED, dtype=torch.long)}
            yield own
            if beside:
                yield {**own, **beside}


def kind(call: dict[str, Tensor]) -> str:
    """Whether a position of the main input is a token, a patch or a frame."""
    main = next(iter(call))
    return {"pixel_values": "patch", "input_values": "frame", "input_features": "frame"}.get(main, "token")


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _patches(config: Any, batch: int) -> dict[str, Tensor]:
    """Images already cut into two rows and three columns of patches."""
    channels, patch = (*_sizes(config, "num_channels"), 3)[0], (*_sizes(config, "patch_size"), 16)[0]
    return {
        "pixel_values": torch.zeros(batch, 6, channels * patch * patch),
        "pixel_attention_mask": torch.ones(batch, 6, dtype=torch.long),
        "spatial_shapes": torch.tensor([2, 3]).repeat(batch, 1),
    }


def _beside(takes: set[str], config: Any, batch: int) -> dict[str, Tensor]:
    """What some models need besides tokens: a box for each token, or detected objects in an image."""
    found = {"bbox": torch.zeros(batch, TOKENS, 4, dtype=torch.long)} if "bbox" in takes else {}
    for name, width in (("visual_feats", "visual_feat_dim"), ("visual_pos", "visual_pos_dim")):
        sizes = _sizes(config, width)
        if name in takes and sizes:
            found[name] = torch.zeros(batch, _OBJECTS, sizes[0])
    return found


def _inputs(name: str, config: Any, batch: int) -> Iterator[Tensor]:
    if name in ("input_ids", "inputs"):
        for length in (TOKENS, *_sizes(config, "max_seq_length", "chunk_size")):
            yield torch.zeros(batch, length, dtype=torch.long)
    elif name == "pixel_values":
        channels = (*_sizes(config, "num_channels", "in_channels"), 3)[0]
        sizes = dict.fromkeys([*_sizes(config, "image_size", "input_size"), 32, 64, 224])
        for size in sizes:
            yield torch.zeros(batch, channels, size, size)
    elif name == "input_values":
        for length, bins in zip(_sizes(config, "max_length"), _sizes(config, "num_mel_bins"), strict=False):
            yield torch.zeros(batch, length, bins)
        yield torch.zeros(batch, _WAVE)
    else:
        widths = _sizes(
            config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size"
        )
        for width in dict.fromkeys([*widths, 80]):
            for positions in _sizes(config, "max_source_positions"):
                yield torch.zeros(batch, width, 2 * positions)
            yield torch.zeros(batch, 50, width)


def _sizes(config: Any, *names: str) -> list[int]:
    """The positive integers that a configuration, or a nested one, has under these names."""
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    found: list[int] = []
    for one in (config, *inside):
        for name in names:
            value = getattr(one, name, None)
            value = value[-1] if isinstance(value, (list, tuple)) and value else value
            if type(value) is int and value > 0:
                found.append(value)
    return found
