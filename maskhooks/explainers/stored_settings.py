"""Convert the settings of explainers to JSON and back, for saved runs and provenance."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskhooks.errors import PluginError, SettingError
from maskhooks.plugins.kind import Kind
from maskhooks.plugins.registry import registry
from maskhooks.settings.schema import Setting, schema_of
from maskhooks.sites.site import SITES, Site

_OBJECT = "object"  # the key that marks an object that cannot be saved; the value is its type


def stored(explainer: Any) -> dict[str, Any]:
    """Return the settings of an explainer, each JSON-serialisable.

    An object that no registered name makes is stored as `{"object": its type}`, and must be passed again.

    Raises:
        PluginError: the explainer does not keep one of its settings.
    """
    kind = type(explainer)
    found: dict[str, Any] = {}
    for setting in schema_of(kind).values():
        if not hasattr(explainer, setting.name):
            raise PluginError(
                f"{kind.__name__} does not keep its setting {setting.name!r}. Assign self.{setting.name} in __init__, "
                "so that it is saved and part of the provenance.",
                plugin=explainer.name,
            )
        found[setting.name] = _encoded(setting, getattr(explainer, setting.name))
    return found


def restored(kind: type[Any], settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that rebuild an explainer of a class.

    Args:
        settings: what `stored` returned.
        given: the objects that could not be stored, by name.

    Raises:
        SettingError: an object that could not be stored is not given, or a value is wrong.
        UnknownNameError: a part is not registered here.
    """
    check_given(settings, given)
    schema = schema_of(kind)
    schema.check_names(settings)
    return {name: given[name] if name in given else _decoded(schema[name], value) for name, value in settings.items()}


def check_given(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise SettingError for an object that could not be stored and is not given again."""
    for name, value in settings.items():
        if name not in given and isinstance(value, Mapping) and set(value) == {_OBJECT}:
            raise SettingError(
                f"the {name} was an object that cannot be saved ({value[_OBJECT]}). Pass it again: "
                f"maskhooks.load(folder, model, {name}=...)"
            )


def _encoded(setting: Setting, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if SITES in setting.checks:
        return [site.to_dict() for site in value]
    kind = _kind(setting)
    if kind is not None:
        if isinstance(value, Mapping):
            return dict(value)
        if kind.made and dataclasses.is_dataclass(value):
            return dataclasses.asdict(value)  # type: ignore[arg-type] # an instance, not a class
        spelt = registry.spell(kind, value) if kind.made or hasattr(value, "settings") else None
        if spelt is not None:
            return spelt["name"] if len(spelt) == 1 else spelt
    if isinstance(value, Path):
        return str(value)
    named = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    return {_OBJECT: named.__qualname__}


def _decoded(setting: Setting, value: Any) -> Any:
    if SITES in setting.checks and isinstance(value, list):
        return [Site.from_dict(site) for site in value]
    kind = _kind(setting)
    if kind is not None and kind.made and isinstance(value, Mapping):
        try:
            return kind.type(**value)  # all fields: a preset may have changed since
        except TypeError as error:
            raise SettingError(f"{setting.name} has unknown settings: {error}") from error
    return value


def _kind(setting: Setting) -> Kind[Any] | None:
    return next((check for check in setting.checks if isinstance(check, Kind)), None)
