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
    """A kind of part, such as gates. A plugin offers parts of a kind with one hook.

    The registry imports none of the packages that own the parts. A kind in an `Annotated` type says that a setting
    is a part: `Annotated[str | Mapping[str, Any] | Gate, GATES]`.

    Attributes:
        name: the singular, as in messages. The hook's name follows from it.
        type: the type of the parts.
        listed: whether the hook returns a list of parts, each with a `name`, instead of a mapping by name.
        made: whether the mapping holds finished parts, instead of callables that make them, such as classes.
    """

    name: str
    type: type[T]
    listed: bool = False
    made: bool = False

    @property
    def plural(self) -> str:
        """The plural, as the hook's name has it."""
        return f"{self.name[:-1]}ies" if self.name.endswith("y") else f"{self.name}s"

    @property
    def hook(self) -> str:
        """The hook that offers such parts."""
        return f"maskhooks_{self.plural}"

    @property
    def returns(self) -> str:
        """A description of what the hook returns."""
        return f"a list of {self.type.__name__} objects" if self.listed else f"a mapping from name to {self.name}"

    @property
    def words(self) -> str:
        """A description of what a setting of this kind accepts."""
        return f"the name of a registered {self.name}, a mapping of its name and settings, or {_a(self.type)}"

    def accepts(self, value: object) -> bool:
        """Whether a setting of this kind may have this value. The registry checks names."""
        return isinstance(value, (str, Mapping)) or self.is_one(value)

    def names(self, returned: object) -> list[str] | None:
        """Return the names of the parts that a hook returned; None if it returned anything else."""
        if self.listed:
            if not isinstance(returned, (list, tuple)) or not all(map(self.is_one, returned)):
                return None
            return [part.name for part in returned]
        if not isinstance(returned, Mapping) or not all(map(self._fits, returned.values())):
            return None
        return list(returned)

    def is_one(self, part: object) -> bool:
        """Whether an object is a part of this kind."""
        return isinstance(part, self.type) and not inspect.isclass(part)

    def _fits(self, part: object) -> bool:
        """Whether the mapping may hold this object."""
        if self.made:
            return self.is_one(part)
        return issubclass(part, self.type) if inspect.isclass(part) else callable(part)


_declared: dict[str, Kind[Any]] = {}
declared: Mapping[str, Kind[Any]] = MappingProxyType(_declared)  # every kind by its hook


def declare(name: str, type: type[T], *, listed: bool = False, made: bool = False) -> Kind[T]:
    """Declare a kind to the registry; see `Kind`."""
    kind = Kind(name, type, listed, made)
    _declared[kind.hook] = kind
    return kind


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
