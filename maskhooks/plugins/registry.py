"""The registry: the plugins found, their packages, the parts they offer, and what failed to load.

Plugins come from `register()`, in a notebook, and from the entry-point group `maskhooks` of installed packages,
built-in parts included. Entry points are loaded one by one, so a broken plugin does not stop the others. An adapter
given to `wrap(..., adapter=...)` serves one call and is not registered.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pluggy

from maskhooks.errors import NameTakenError, PluginError, PluginWarning, SettingError, UnknownNameError, close_matches
from maskhooks.plugins import hookspecs
from maskhooks.plugins.kind import Kind, declared
from maskhooks.settings.schema import schema_of, summary

OURS = "maskhooks"

T = TypeVar("T")


class Offer(NamedTuple):
    """A part that a plugin offers: its kind and name, and the first line of its docstring."""

    kind: str
    name: str
    line: str


@dataclass
class PluginReport:
    """One plugin: its package, and the parts it offers or why it could not be loaded."""

    name: str
    distribution: str
    version: str
    offers: list[Offer] = field(default_factory=list)
    error: str = ""

    @property
    def package(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}".strip()


class Registry:
    """Plugins and the parts they offer. Entry points are loaded on first use."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("maskhooks")
        self.manager.add_hookspecs(hookspecs)
        self.reports: list[PluginReport] = []
        self._loaded = False

    def load(self) -> None:
        """Load the entry points of the group `maskhooks`, once; report those that fail, and leave them out."""
        if self._loaded:
            return
        self._loaded = True
        found: dict[tuple[str, str], tuple[Any, Any]] = {}  # a distribution may be found twice, in two folders
        for distribution in importlib.metadata.distributions():
            for entry in distribution.entry_points:
                if entry.group == "maskhooks":
                    found.setdefault((distribution.metadata["Name"], entry.name), (entry, distribution))
        # Ours first: this takes our names and declares every kind of part.
        for _, (entry, distribution) in sorted(found.items(), key=lambda item: item[0][0] != OURS):
            self._load(entry, distribution)

    def _load(self, entry: importlib.metadata.EntryPoint, distribution: importlib.metadata.Distribution) -> None:
        name = distribution.metadata["Name"]
        report = PluginReport(entry.name, name, distribution.version)
        self.reports.append(report)
        try:
            self._check_free(entry.name)
            report.offers = self._add(entry.load(), entry.name)
        except Exception as error:
            if name == OURS and not isinstance(error, ImportError):
                raise
            report.error = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"plugin {entry.name!r} of {name} {distribution.version} was not loaded: {report.error}",
                PluginWarning,
                stacklevel=4,
            )

    def register(self, plugin: Any, name: str | None = None) -> Any:
        """Register a plugin and return it, so this also works as a decorator.

        Args:
            plugin: an adapter or task, as a class or an object; or a module or object with hook implementations.
            name: the name in lists; by default the plugin's own.

        Raises:
            NameTakenError: the plugin's name, or the name of one of its parts, is taken.
            PluginError: it implements no hook, or one that does not exist.
        """
        self.load()
        part = plugin() if inspect.isclass(plugin) else plugin
        if name is None:
            name = getattr(part, "name", None) or getattr(part, "__name__", None) or type(part).__name__
        kind = next((kind for kind in declared.values() if kind.listed and kind.is_one(part)), None)
        holder = part if kind is None else _alone(kind, part)
        self._check_free(name)
        offers = self._add(holder, name)
        self.reports.append(PluginReport(name, "(registered by hand)", "", offers))
        return plugin

    def unregister(self, name: str) -> None:
        """Remove a plugin.

        Raises:
            UnknownNameError: no plugin has this name.
        """
        if not self.manager.has_plugin(name):
            names = [report.name for report in self.reports]
            raise UnknownNameError(f"no plugin {name!r} is registered.", plugin=name, near=close_matches(name, names))
        self.manager.unregister(name=name)
        self.reports = [report for report in self.reports if report.name != name]

    def kinds(self) -> list[Kind[Any]]:
        """Return every kind of part, in the order of the hooks."""
        self.load()  # a plugin may declare kinds
        order = list(vars(hookspecs))
        return sorted(declared.values(), key=lambda kind: order.index(kind.hook) if kind.hook in order else len(order))

    def listed(self, kind: Kind[T]) -> list[T]:
        """Return all parts of a kind that plugins offer in lists, such as adapters."""
        return [part for parts in self._offers(kind) for part in parts]

    def parts(self, kind: Kind[Any]) -> dict[str, Any]:
        """Return all parts of a kind by name, such as gates: callables that make one, or finished parts."""
        return {name: part for parts in reversed(self._offers(kind)) for name, part in parts.items()}

    def make(
        self,
        kind: Kind[T],
        wanted: str | Mapping[str, Any] | T,
        offers: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> T:
        """Make a part.

        Args:
            wanted: its name, or a mapping of its name and settings, `{"name": "hard-concrete", "temperature": 0.5}`. A
                finished part is returned as it is.
            offers: arguments offered to any part of this kind, such as `min_logit` to probes; a part gets those that
                its signature names.
            settings: its settings, as in the mapping.

        Raises:
            UnknownNameError: no part has this name; the message lists similar names.
            SettingError: a setting is of the wrong type or out of range, or the part does not have it.
        """
        if not isinstance(wanted, (str, Mapping)):
            return wanted
        name, own = self._spelt(kind, {**_mapping(wanted), **settings})
        part = self.part(kind, name)
        if kind.made:
            made: T = dataclasses.replace(part, **own) if own else part
            return made
        taken = inspect.signature(part).parameters  # the schema leaves out `hooked`
        offered = {key: value for key, value in (offers or {}).items() if key in taken and key not in own}
        return part(**offered, **own)  # type: ignore[no-any-return] # checked when the plugin was registered

    def check(self, kind: Kind[Any], wanted: Any) -> None:
        """Raise what `make` raises for an unknown name or a wrong setting; make nothing."""
        if isinstance(wanted, (str, Mapping)):
            self._spelt(kind, _mapping(wanted))

    def _spelt(self, kind: Kind[Any], mapping: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the name in a mapping, and its other entries as checked settings."""
        name = mapping.get("name")
        if not isinstance(name, str) or not name:
            raise SettingError(f"a {kind.name} is given as {{'name': ..., **settings}}, got {dict(mapping)!r}")
        own = {key: value for key, value in mapping.items() if key != "name"}
        part = self.part(kind, name)
        if kind.made and own and not dataclasses.is_dataclass(part):
            raise SettingError(f"the {kind.name} {name!r} takes no settings, got {', '.join(own)}")
        if not own:
            return name, own
        schema = schema_of(type(part) if kind.made else part)
        return name, schema.check(own, f"the {kind.name} {name!r}")

    def part(self, kind: Kind[Any], wanted: str) -> Any:
        """Return what is registered under a name: a callable that makes the part, such as its class.

        Raises:
            UnknownNameError: no part has this name; the message lists similar names.
        """
        parts = self.parts(kind)
        if wanted not in parts:
            raise UnknownNameError(
                f"no {kind.name} is named {wanted!r}. The {kind.plural} are {', '.join(sorted(parts))}.",
                near=close_matches(wanted, parts),
            )
        return parts[wanted]

    def spell(self, kind: Kind[Any], part: Any) -> dict[str, Any] | None:
        """Return the name and settings from which `make` makes a part again; None if its class is not registered."""
        settings = part.settings() if hasattr(part, "settings") else {}
        for name, make in self.parts(kind).items():
            if make is type(part) or make is part:
                return {"name": name, **settings}
        return None

    def _add(self, plugin: Any, name: str) -> list[Offer]:
        """Register with pluggy, and undo that if a hook is unknown or a name is taken."""
        known = self.manager.get_name(plugin)
        if known is not None:
            raise NameTakenError(f"plugin {name!r} is already registered, as {known!r}.", plugin=name)
        taken = {hook: set(self.parts(kind)) for hook, kind in declared.items() if not kind.listed}
        try:
            self._register(plugin, name)
            self._check(name)
            offers: list[Offer] = []
            for hook in self.manager.get_hookcallers(plugin) or []:
                if not hook.has_spec():
                    continue  # an optional hook, for another version of maskhooks
                kind = declared[hook.name]
                parts = self._offered(kind, hook, plugin, name)
                clash = taken.get(hook.name, set()) & set(parts)
                if clash:
                    raise NameTakenError(
                        f"plugin {name!r} offers the {kind.name} {sorted(clash)[0]!r}, but that name is "
                        "taken. Choose another name.",
                        plugin=name,
                    )
                offers += [Offer(kind.name, *found) for found in parts.items()]
        except Exception:
            if self.manager.get_name(plugin) is not None:
                self.manager.unregister(plugin)
            raise
        return sorted(offers)

    def _offered(self, kind: Kind[Any], hook: pluggy.HookCaller, plugin: Any, name: str) -> dict[str, str]:
        """Return the names of the parts that one hook of a plugin returns, each with a line about it."""
        returned: Any
        (returned,) = [part.function() for part in hook.get_hookimpls() if part.plugin is plugin]
        names = kind.names(returned)
        if names is None:
            raise PluginError(
                f"plugin {name!r}: {hook.name} returned {returned!r}. It must return {kind.returns}.", plugin=name
            )
        parts = returned if kind.listed else returned.values()
        return {name: _line(part) for name, part in zip(names, parts, strict=True)}

    def _check_free(self, name: str) -> None:
        if self.manager.has_plugin(name):
            raise NameTakenError(
                f"a plugin named {name!r} is already registered. Unregister it first "
                f"(maskhooks.unregister({name!r})), or register this one with another name=.",
                plugin=name,
            )

    def _register(self, plugin: Any, name: str) -> None:
        try:
            self.manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {name!r} has a hook with wrong arguments: {error}", plugin=name) from error

    def _offers(self, kind: Kind[Any]) -> list[Any]:
        """Return what each plugin offers of a kind, the last registered first."""
        self.load()
        return list(getattr(self.manager.hook, kind.hook)())

    def _check(self, name: str) -> None:
        plugin = self.manager.get_plugin(name)
        hooks = self.manager.get_hookcallers(plugin) or []
        for hook in hooks:  # like pluggy's check_pending, for this plugin alone
            if not hook.has_spec() and not all(part.optionalhook for part in hook.get_hookimpls()):
                known = [key for key in vars(hookspecs) if key.startswith("maskhooks_")]
                likely = close_matches(hook.name, known, 1)
                raise PluginError(
                    f"plugin {name!r} implements {hook.name!r}, but there is no such hook. "
                    + (f"Did you mean {likely[0]!r}? " if likely else "")
                    + f"The hooks are {', '.join(known)}.",
                    plugin=name,
                )
        if not hooks:
            what = "a module" if isinstance(plugin, ModuleType) else f"an object of type {type(plugin).__name__}"
            raise PluginError(
                f"plugin {name!r}, {what}, implements no hook of maskhooks. Decorate its functions with "
                f"@maskhooks.hookimpl, or register an Adapter or a Task.",
                plugin=name,
            )


def _mapping(wanted: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"name": wanted} if isinstance(wanted, str) else wanted


def _line(part: Any) -> str:
    """Return a part's `description`, or else the first paragraph of its docstring, as one line."""
    own = getattr(part, "description", "")
    documented = part if inspect.isclass(part) or inspect.isroutine(part) else type(part)
    return own if isinstance(own, str) and own else summary(documented)


def _alone(kind: Kind[Any], part: object) -> object:
    """Return a plugin that offers one part, of a kind that plugins offer in lists."""
    return SimpleNamespace(**{kind.hook: hookspecs.hookimpl(lambda: [part])})


registry = Registry()
register = registry.register
unregister = registry.unregister
