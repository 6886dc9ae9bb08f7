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
    """A kind of part, such as gates. A plugin offers parts of it with one hook.

    The registry knows a kind by its name alone, so it imports none of the packages whose parts it holds. In an
    `Annotated` type a kind says that a setting is a part: `Annotated[str | Mapping[str, Any] | Gate, GATES]`.

    Attributes:
        name: the singular, as messages have it. The hook's name follows from it.
        type: what a part is an instance of.
        listed: whether the hook returns a list of parts, each with a `name`, instead of a mapping by name.
        made: whether such a mapping holds the parts themselves, instead of what makes them, such as their classes.
    """

    name: str
    type: type[T]
    listed: bool = False
    made: bool = False

    @property
    def plural(self) -> str:
        return f"{self.name[:-1]}ies" if self.name.endswith("y") else f"{self.name}s"

    @property
    def hook(self) -> str:
        """The hook that offers such parts."""
        return f"maskhooks_{self.plural}"

    @property
    def returns(self) -> str:
        """What the hook returns, in words."""
        return f"a list of {self.type.__name__} objects" if self.listed else f"a mapping from name to {self.name}"

    @property
    def words(self) -> str:
        """What a setting of this kind accepts, in words."""
        return f"the name of a registered {self.name}, a mapping of its name and settings, or {_a(self.type)}"

    def accepts(self, value: object) -> bool:
        """Whether a setting of this kind may have this value; the registry says whether a name is known."""
        return isinstance(value, (str, Mapping)) or self.is_one(value)

    def names(self, returned: object) -> list[str] | None:
        """The names of the parts that a hook returned; None where it returned anything else."""
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
        """Whether an object may stand in the mapping."""
        if self.made:
            return self.is_one(part)
        return issubclass(part, self.type) if inspect.isclass(part) else callable(part)


_declared: dict[str, Kind[Any]] = {}
declared: Mapping[str, Kind[Any]] = MappingProxyType(_declared)  # every kind by its hook


def declare(name: str, type: type[T], *, listed: bool = False, made: bool = False) -> Kind[T]:
    """Declares a kind to the registry; see `Kind`."""
    kind = Kind(name, type, listed, made)
    _declared[kind.hook] = kind
    return kind


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
