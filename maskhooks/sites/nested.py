"""Nested values: read and replace one tensor inside tuples, lists, mappings and dataclasses.

A path is a tuple of steps. An `int` indexes a sequence (`[1]`), a `str` names a mapping's key or the field of
a dataclass or named tuple (`.last_hidden_state`). Nothing is changed in place: `put` copies only the
containers along the path.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

Step = int | str
Path = tuple[Step, ...]


class PathError(LookupError):
    """A path does not exist in a value; the message says where it ends and what is there."""


def get(value: Any, path: Path) -> Any:
    """Return the value at `path`.

    Raises:
        PathError: a step does not exist; the message describes the value reached.
    """
    depth = 0
    try:
        for depth, step in enumerate(path):  # noqa: B007 # `depth` is for the message
            value = _child(value, step)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        where = f" at {format_path(path[:depth])}" if depth else ""
        raise PathError(f"no {format_path((path[depth],))} in {describe(value)}{where}") from error
    return value


def put(value: Any, path: Path, new: Any) -> Any:
    """Return a copy of `value` with `new` at `path`; containers off the path are shared with the original.

    Raises:
        PathError: a step does not exist.
        TypeError: a container on the path cannot be copied with one part replaced.
    """
    get(value, path)
    return _put(value, path, new)


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor inside `value` with its path, in order; plain objects are not searched.

    A key that is neither a number nor a string, such as a type of edges, is shown as text, and cannot be addressed.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, key if isinstance(key, (int, str)) else str(key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=True):
            yield from tensors(item, (*path, name))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name, None), (*path, field.name))


def format_path(path: Path) -> str:
    """Format `(1, "states")` as `[1].states`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def describe(value: Any) -> str:
    """Describe a value for messages: its type, and where its tensors are."""
    if isinstance(value, Tensor):
        return f"a tensor {_shape(value)}"
    inside = [f"{format_path(path)} {_shape(tensor)}" for path, tensor in tensors(value)]
    kind = f"a {type(value).__name__}" if value is not None else "None"
    return kind + (f" with tensors at {', '.join(inside[:6])}{', ...' if len(inside) > 6 else ''}" if inside else "")


def _shape(tensor: Tensor) -> str:
    return "(nested)" if tensor.is_nested else str(list(tensor.shape))


def _child(value: Any, step: Step) -> Any:
    if isinstance(value, Tensor):
        raise TypeError("a tensor has no parts to address")
    if isinstance(step, int):
        if isinstance(value, Mapping) and step not in value:
            return list(value.values())[step]
        return value[step]
    if isinstance(value, Mapping):
        return value[step]
    if step.startswith("__"):
        raise AttributeError(step)
    return getattr(value, step)


def _put(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    step, rest = path[0], path[1:]
    inner = _put(_child(value, step), rest, new)
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            name = value._fields[step] if isinstance(step, int) else step
            return value._replace(**{name: inner})  # type: ignore[attr-defined] # a named tuple
        items: Any = list(value)
        if isinstance(step, str):  # torch's return types have names, but do not list them
            step = next(index for index, item in enumerate(items) if item is _child(value, step))
        items[step] = inner
        return type(value)(items)  # torch's return types take a list too
    if isinstance(value, (list, MutableMapping)):
        result: Any = copy.copy(value)
        if isinstance(value, MutableMapping) and isinstance(step, int) and step not in value:
            step = list(value)[step]  # by position, as in ModelOutput
        result[step] = inner
        return result
    return _copy_with(value, step, inner)


def _copy_with(value: Any, step: Step, inner: Any) -> Any:
    try:
        if not isinstance(step, str) or isinstance(value, Mapping):
            raise TypeError("it is read-only")
        result = copy.copy(value)
        object.__setattr__(result, step, inner)  # a frozen dataclass too
    except (TypeError, AttributeError) as error:
        raise TypeError(f"cannot replace {format_path((step,))} in a copy of {describe(value)}: {error}") from error
    return result
