"""Types of settings, with their ranges; a value is checked against both.

    def fit(..., steps: Count | None = None, save_every: Positive = 60.0): ...

A type with its own check, such as a selector of sites, carries an object with the methods of `Check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Le, Lt, MinLen

#: A whole number from 1.
Count = Annotated[int, Ge(1)]
#: A whole number from 0.
Natural = Annotated[int, Ge(0)]
#: A random seed: a whole number from 0.
Seed = Annotated[int, Ge(0), Lt(2**63)]
#: A number above 0.
Positive = Annotated[float, Gt(0)]
#: A number from 0.
NonNegative = Annotated[float, Ge(0)]
#: A number from 0 to 1.
Fraction = Annotated[float, Ge(0), Le(1)]
#: A number from 0 and below 1, such as the decay of a moving average.
Decay = Annotated[float, Ge(0), Lt(1)]
#: A string that is not empty.
Text = Annotated[str, MinLen(1)]
#: A path, as a string or a Path.
Folder = Text | Path


class _Loader:
    """Refuses what can be iterated and holds no batches; the loader itself is not read."""

    words = "a DataLoader or a list of batches, [batch] for a single one"

    def accepts(self, value: Any) -> bool:
        one = isinstance(value, (str, bytes, Mapping)) or hasattr(value, "dtype")  # a tensor or an array
        table = callable(getattr(value, "to_dict", None)) and callable(getattr(value, "keys", None))  # or a graph
        return not (one or table) and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


#: Batches, in a loader or a list.
Batches = Annotated[Iterable[Any], _Loader()]


@runtime_checkable
class Check(Protocol):
    """A check in an `Annotated` type that replaces the check of the type itself."""

    @property
    def words(self) -> str:
        """What is accepted, as errors word it: "the name of a gate, or a Gate"."""

    def accepts(self, value: Any) -> bool:
        """Whether a value is accepted."""
