"""The schema of settings: what a function or class accepts, read from its signature and its docstring.

The signature gives each setting's name, type, range and default; the docstring's `Args:` says what it means. The
schema checks calls, and `--help`, the reference and saved runs are made from it.

    >>> schema = schema_of(DiffMask)
    >>> schema["margin"].words
    'a number above 0'
    >>> schema.check({"margin": -1.0})
    SettingError: DiffMask: margin must be a number above 0, got -1.0.

pydantic checks types in strict mode: "5" is not the number 5, and True is not 1. An int counts as a float, and a numpy
number as the equal Python number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

import numpy as np
from annotated_types import Ge, Gt, Le, Lt, MinLen
from docstring_parser import DocstringStyle, parse

from maskhooks.errors import SettingError, close_matches
from maskhooks.settings.types import Check

REQUIRED = inspect.Parameter.empty

_BUILTIN = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", type(None): "None"}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: the keyword.
        annotation: its type, with ranges and checks.
        default: its default; `REQUIRED` if it has none.
        description: what it means, from the docstring; "" if the docstring does not say.
    """

    name: str
    annotation: Any
    default: Any
    description: str

    @property
    def words(self) -> str:
        """What is accepted, type and range, as errors word it."""
        return words(self.annotation)

    @property
    def checks(self) -> list[Check]:
        """The checks that its type carries, such as a kind of part."""
        return _checks(self.annotation)

    def check(self, value: Any, owner: str) -> Any:
        """Return the value; a numpy number becomes a Python one, and an int a float if a float is expected.

        Raises:
            SettingError: the value is of the wrong type or out of range.
        """
        value = value.item() if isinstance(value, np.generic) else value
        if not _unchecked(self.annotation) and not self._accepts(value):
            raise SettingError(f"{owner}: {self.name} must be {self.words}, got {_shown(value)}.")
        return float(value) if type(value) is int and _floats(self.annotation) else value

    def _accepts(self, value: Any) -> bool:
        checks = self.checks
        if checks:
            return (value is None and _optional(self.annotation)) or any(check.accepts(value) for check in checks)
        return any(_fits(part, value) for part in _parts(self.annotation))


@dataclass(frozen=True)
class Schema(Mapping[str, Setting]):
    """The settings that a function or class accepts, by name.

    Attributes:
        owner: the name of the function or class.
        settings: the settings, in the order of the signature.
        closed: whether there are no others; False if the signature has `**settings`.
    """

    owner: str
    settings: Mapping[str, Setting]
    closed: bool = True

    def __getitem__(self, name: str) -> Setting:
        return self.settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def check(self, values: Mapping[str, Any], owner: str | None = None) -> dict[str, Any]:
        """Return the values, each checked.

        Args:
            owner: what an error names instead of the schema's owner.

        Raises:
            SettingError: a value is of the wrong type or out of range, or no setting has its name.
        """
        self.check_names(values, owner)
        owner = owner or self.owner
        return {name: self[name].check(value, owner) if name in self else value for name, value in values.items()}

    def check_names(self, names: Iterable[str], owner: str | None = None) -> None:
        """Raise SettingError if no setting has one of these names."""
        for name in names:
            if name not in self and self.closed:
                likely = close_matches(name, self, 3)
                hint = f" Did you mean {' or '.join(map(repr, likely))}?" if likely else ""
                listed = f"The settings are {', '.join(self)}." if self.settings else "It has no settings."
                raise SettingError(f"{owner or self.owner} has no setting {name!r}.{hint} {listed}")


def schema_of(owner: Callable[..., Any]) -> Schema:
    """Return the schema of a function, a class, or any other callable that makes a part.

    `self` and `hooked`, the wrapped model, are not settings.
    """
    return _schema_of(cast(Hashable, owner))


@functools.cache
def _schema_of(owner: Any) -> Schema:
    parameters = inspect.signature(owner).parameters
    hints = _hints(owner)
    meanings = descriptions(owner)
    settings = {
        name: Setting(name, hints.get(name, Any), parameter.default, meanings.get(name, ""))
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name not in ("self", "hooked")
    }
    return Schema(_name(owner), settings, not any(one.kind is one.VAR_KEYWORD for one in parameters.values()))


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function or method so that each call checks its arguments.

    Raises:
        SettingError: from a call with a wrong value, or with an unknown keyword.
    """
    signature = inspect.signature(function)
    method = next(iter(signature.parameters), "") in ("self", "cls")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        schema = schema_of(function)
        owner = _owner(function, args[0] if method and args else None)
        schema.check_names(set(kwargs) - {"hooked"}, owner)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own error names what is missing
        for name, value in bound.arguments.items():
            if name in schema:
                bound.arguments[name] = schema[name].check(value, owner)
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(instance: Any) -> None:
    """Check the fields of a frozen dataclass, from its `__post_init__`.

    Raises:
        SettingError: a value is of the wrong type or out of range.
    """
    schema = schema_of(type(instance))
    for field in fields(instance):
        value = schema[field.name].check(getattr(instance, field.name), schema.owner)
        object.__setattr__(instance, field.name, value)


def words(annotation: Any) -> str:
    """Describe a type and its range: "a whole number from 1 or None"."""
    checks = _checks(annotation)
    if checks:
        found = [check.words for check in checks] + ["None"] * _optional(annotation)
    else:
        found = list(dict.fromkeys(_words(part) for part in _parts(annotation)))
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        base, *limits = get_args(annotation)
        return _words(base) + "".join(map(_range, limits))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if annotation in _BUILTIN:
        return _BUILTIN[annotation]
    origin = get_origin(annotation) or annotation
    if inspect.isclass(origin):
        if issubclass(origin, Mapping):
            return "a mapping"
        if origin in (list, tuple) or origin.__module__ == "collections.abc":
            return "a function" if origin is typing.get_origin(Callable[..., Any]) else _a(origin.__name__.lower())
        if "Tensor" in origin.__name__:
            return "a Tensor"
        return _a(origin.__name__)
    return str(annotation).replace("typing.", "")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def _range(limit: Any) -> str:
    if isinstance(limit, Ge):
        return f" from {limit.ge}"
    if isinstance(limit, Gt):
        return f" above {limit.gt}"
    if isinstance(limit, Le):
        return f" to {limit.le}"
    if isinstance(limit, Lt):
        return f" and below {limit.lt}" if limit.lt != 2**63 else ""
    return " that is not empty" if isinstance(limit, MinLen) else ""


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    return [annotation]


def _checks(annotation: Any) -> list[Check]:
    return [
        metadata
        for part in _parts(annotation)
        if get_origin(part) is Annotated
        for metadata in part.__metadata__
        if isinstance(metadata, Check)
    ]


def _optional(annotation: Any) -> bool:
    return type(None) in _parts(annotation)


def _floats(annotation: Any) -> bool:
    """Whether the type accepts a float and not an int."""
    bases = [get_args(part)[0] if get_origin(part) is Annotated else part for part in _parts(annotation)]
    return float in bases and int not in bases


def _unchecked(annotation: Any) -> bool:
    """Whether a type cannot be checked: Any, or an iterable, which a check would exhaust."""
    return any(
        part is Any or isinstance(part, (str, TypeVar)) or getattr(get_origin(part), "__name__", "") == "Iterable"
        for part in _parts(annotation)
    )


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a value has a type that is not a union."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if inspect.isclass(annotation) and annotation not in _BUILTIN and get_origin(annotation) is None:
        return isinstance(value, annotation)
    from pydantic import ValidationError

    try:
        _validator(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


@functools.cache
def _validator(annotation: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations, resolved one by one; one with names that exist only for type checkers is left out."""
    target: Any = owner.func if isinstance(owner, functools.partial) else owner
    target = owner.__init__ if inspect.isclass(owner) and not is_dataclass(owner) else target
    target = inspect.unwrap(target)
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        pass
    found: dict[str, Any] = {}
    for name, annotation in getattr(target, "__annotations__", {}).items():
        with contextlib.suppress(NameError, TypeError):
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            found |= typing.get_type_hints(holder, vars(sys.modules[target.__module__]), include_extras=True)
    return found


def descriptions(owner: Callable[..., Any]) -> dict[str, str]:
    """Return what each argument means, from `Args:` in the docstring of a function, a class or its bases."""
    found: dict[str, str] = {}
    for source in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        for parameter in parse(source.__doc__ or "", DocstringStyle.GOOGLE).params:
            text = " ".join((parameter.description or "").split())
            if text and not text.startswith("as `"):  # a base class explains it
                for name in parameter.arg_name.split(","):
                    found.setdefault(name.strip(), text)
    return found


def summary(part: Any) -> str:
    """Return the first paragraph of a part's docstring as one line; "" if it has none."""
    text = inspect.getdoc(part) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", None) or type(owner).__name__


def _owner(function: Callable[..., Any], instance: Any) -> str:
    if instance is None:
        return _name(function)
    kind = instance if inspect.isclass(instance) else type(instance)
    return kind.__name__ if _name(function) == "__init__" else f"{kind.__name__}.{_name(function)}"


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    text = repr(value) if shape is None else f"{_a(type(value).__name__)} of shape {list(shape)}"
    return text if len(text) <= 80 else f"{text[:77]}..."
