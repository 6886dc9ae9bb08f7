"""Fingerprints: check whether a saved explainer belongs to a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return a digest of a model's structure, tensor names, shapes, and 64 values per tensor, rounded to bfloat16.

    Rounding lets a model saved in half precision match the original.

    Returns:
        `{"model": class name, "digest": sha256, "tensors": {name: [shape, short digest]}}`.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    digests = _digests(list(state.values()))
    tensors = {
        name: [list(tensor.shape), digest] for (name, tensor), digest in zip(state.items(), digests, strict=True)
    }
    modules = [f"{name}:{type(module).__name__}" for name, module in model.named_modules()]
    text = json.dumps([modules, tensors])
    return {
        "model": type(model).__name__,
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "tensors": tensors,
    }


def differences(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Return the differences between two fingerprints as text; empty if there are none."""
    if saved["digest"] == present["digest"]:
        return []
    old, new = saved["tensors"], present["tensors"]
    found = (
        [f"the model is a {present['model']}, saved for a {saved['model']}"]
        if saved["model"] != present["model"]
        else []
    )
    found += [f"{name} is missing" for name in old if name not in new]
    found += [f"{name} is new" for name in new if name not in old]
    for name in old.keys() & new.keys():
        if old[name][0] != new[name][0]:
            found.append(f"{name} has shape {new[name][0]}, saved with {old[name][0]}")
        elif old[name][1] != new[name][1]:
            found.append(f"{name} has different values")
    return found or ["modules have different types"]


@torch.no_grad()
def _digests(tensors: list[Tensor]) -> list[str]:
    """Return a short digest of evenly spaced values of each tensor; empty for tensors without values."""
    samples = [_sample(tensor) for tensor in tensors]
    if not samples:
        return []
    together = torch.cat([sample.to("cpu", torch.float32) for sample in samples])
    rounded = together.to(torch.bfloat16).view(torch.int16).numpy()
    found, start = [], 0
    for sample in samples:
        end = start + len(sample)
        found.append(hashlib.sha256(rounded[start:end].tobytes()).hexdigest()[:12] if end > start else "")
        start = end
    return found


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.is_meta or not len(flat):
        return torch.empty(0)
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
