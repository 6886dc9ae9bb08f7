"""Run state: the whole state of a training run in safetensors files with JSON; never a pickle, never half written.

A state is a tree of dictionaries and lists whose leaves are tensors, numbers, strings and None.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maskhooks.atomic_write import atomic_open, clear
from maskhooks.errors import CorruptFileError, ResumeWarning
from maskhooks.settings.format import FORMAT, check_format

_KEPT = 2  # states: the last one, and the one before in case the last is broken
_TENSOR = "$tensor"


def state_folder(run_dir: Path) -> Path:
    """Return the folder of a run's states."""
    return run_dir / "state"


def save_state(folder: Path, number: int, tree: Any) -> Path:
    """Write the state after `number` steps, and keep only the last two.

    Raises:
        StorageError: the state cannot be written; earlier states are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder / "step-*")
    path = folder / f"step-{number:09d}.safetensors"
    with atomic_open(path) as file:
        file.write(encode(tree))
    for old in _newest_first(folder)[_KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def load_state(folder: Path) -> Any | None:
    """Return the last good state, or None if there are no states; a broken one is skipped with a warning.

    Raises:
        CorruptFileError: all states are broken.

    Warns:
        ResumeWarning: the last state is broken, so the one before it is used.
    """
    paths = _newest_first(folder)
    broken: list[str] = []
    for path in paths:
        try:
            tree = decode(path.read_bytes(), path)
        except (OSError, ValueError) as error:
            broken.append(f"{path.name}: {error}")
            continue
        if broken:
            warnings.warn(
                f"a saved state in {folder} is broken ({'; '.join(broken)}). Resuming from {path.name}, the one "
                f"before it.",
                ResumeWarning,
                stacklevel=2,
            )
        return tree
    if broken:
        raise CorruptFileError(
            f"every saved state in {folder} is broken ({'; '.join(broken)}); pickles are never read. Start again "
            f"without resume.",
            path=folder,
        )
    return None


def delete_states(folder: Path) -> None:
    """Delete the states of an earlier run."""
    for path in _newest_first(folder):
        path.unlink()


def has_state(folder: Path) -> bool:
    """Whether there is a state to resume from, good or broken."""
    return bool(_newest_first(folder))


def encode(tree: Any) -> bytes:
    """Encode a tree as the bytes of a safetensors file."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "tree": _without_tensors(tree, tensors)})
    return safetensors.torch.save(tensors, {"tree": text, "digest": _digest(text, tensors)})


def decode(data: bytes, source: object = "the state of the run") -> Any:
    """Decode the bytes that `encode` returned.

    Raises:
        ValueError: the bytes are not a state, or were changed.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        tensors = safetensors.torch.load(data)
        text = metadata["tree"]
        if metadata["digest"] != _digest(text, tensors):
            raise ValueError("its contents were changed after writing")
        held = json.loads(text)
    except (safetensors.SafetensorError, UnicodeDecodeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a state, or only part of one ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError("not a state, or only part of one") from error
    check_format(source, held["format"])
    return _with_tensors(held["tree"], tensors)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _without_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(tree, dict):
        return {key: _without_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without_tensors(value, tensors) for value in tree]
    return tree


def _with_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict) and _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if isinstance(tree, dict):
        return {key: _with_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_tensors(value, tensors) for value in tree]
    return tree


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()
