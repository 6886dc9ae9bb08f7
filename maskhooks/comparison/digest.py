"""A digest of data, to tell whether a resumed call has the same."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor


def digest(value: Any) -> str:
    """Return a hash of nested values: tensors and arrays by content, other leaves as text, objects by their type."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        value = dense.cpu().float().numpy() if dense.dtype.itemsize == 2 else dense.cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _held(key, item)
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield f"[{len(value)}]".encode()
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _held(field.name, getattr(value, field.name, None))
    elif callable(getattr(value, "to_dict", None)) and not isinstance(value, type):
        yield from _parts(value.to_dict())  # such as a batch of graphs
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        yield f"{value!r};".encode()
    else:
        yield type(value).__qualname__.encode()


def _held(name: Any, item: Any) -> Iterator[bytes]:
    yield f"{name!r}:".encode()
    yield from _parts(item)
