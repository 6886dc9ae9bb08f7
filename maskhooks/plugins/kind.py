"""Kinds of parts that plugins offer, each declared by the package that owns its type."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of part, such as gates; a plugin offers parts of it with one hook.

    The registry knows a kind by its name alone, so that it imports none of the packages whose parts it holds.

    Attributes:
        name: in the singular, as messages have it; it gives the hook's name.
        type: what a part is an instance of.
        listed: whether the hook returns a list of parts, each with a `name`, instead of a mapping by name.
        made: whether such a mapping holds the parts themselves, instead of what makes them, such as their classes.
    """

    name: str
    type: type[T]
    listed: bool = False
    made: bool = False

    @property
    def hook(self) -> str:
        """The hook that offers such parts."""
        return f"maskhooks_{self.name}s"

    @property
    def returns(self) -> str:
        """What the hook returns, in words."""
        return f"a list of {self.type.__name__} objects" if self.listed else f"a mapping from name to {self.name}"

    def names(self, returned: object) -> list[str] | None:
        """The names of the parts that a hook returned; None where that is something else than it should return."""
        if self.listed:
            if not isinstance(returned, (list, tuple)) or not all(map(self.is_one, returned)):
                return None
            return [part.name for part in returned]
        if not isinstance(returned, Mapping) or not all(map(self._fits, returned.values())):
            return None
        return list(returned)

    def is_one(self, part: object) -> bool:
        """Whether an object is a part of this kind."""
        return isinstance(part, self.type)

    def _fits(self, part: object) -> bool:
        """Whether an object may stand in the mapping."""
        if self.made:
            return self.is_one(part)
        return issubclass(part, self.type) if inspect.isclass(part) else callable(part)


_declared: dict[str, Kind[Any]] = {}
declared: Mapping[str, Kind[Any]] = MappingProxyType(_declared)  # every kind by its hook


def declare(name: str, type: type[T], *, listed: bool = False, made: bool = False) -> Kind[T]:
    """A kind that the registry is to know; see `Kind`."""
    kind = Kind(name, type, listed, made)
    _declared[kind.hook] = kind
    return kind
