"""The registry: three doors, names that clash, and plugins that are broken in every way."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import maskhooks
from maskhooks import hookimpl
from maskhooks.errors import NameTakenError, PluginError, PluginWarning, UnknownNameError
from maskhooks.masks.baselines import BASELINES, Zero
from maskhooks.masks.gates import GATES, Bernoulli, HardConcrete
from maskhooks.model.adapter import ADAPTERS, Adapter
from maskhooks.model.source import Factory
from maskhooks.model.task import TASKS, Task
from maskhooks.plugins import hookspecs
from maskhooks.plugins.kind import declared
from maskhooks.plugins.registry import Registry
from maskhooks.sites.site import Site
from tests.fresh_process import printed_by


class Probe(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ProbeAdapter(Adapter):
    """Finds a probe."""

    name = "probe"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (Probe,)

    def sites(self, name: str, module: nn.Module) -> list[Site]:
        return [Site(name)]


class Fakes(ModuleType):
    """The module that a fake package's entry points name; some of its attributes raise when asked for."""

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self).get("plugins", {}):  # others look through all modules
            raise AttributeError(name)
        found = self.plugins[name]
        if isinstance(found, BaseException):
            raise found
        return found


class Package(importlib.metadata.Distribution):
    """An installed package whose entry points load the given plugins."""

    def __init__(self, distribution: str, **plugins: Any) -> None:
        self._name = distribution
        fakes = Fakes(f"fakes_of_{distribution}")
        fakes.plugins = plugins  # type: ignore[attr-defined]
        sys.modules[fakes.__name__] = fakes
        entries = "".join(f"{name} = {fakes.__name__}:{name}\n" for name in plugins)
        self._texts = {
            "METADATA": f"Name: {distribution}\nVersion: 9.9\n",
            "entry_points.txt": f"[console_scripts]\nother = nothing:here\n[maskhooks]\n{entries}",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


def loaded(monkeypatch: pytest.MonkeyPatch, *found: Package) -> Registry:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(found))
    registry = Registry()
    registry.load()
    return registry


def plugin(**hooks: Any) -> ModuleType:
    """A module with hook implementations that return the given values."""
    module = ModuleType("a_plugin")
    for name, value in hooks.items():
        setattr(module, name, hookimpl(lambda value=value: value))
    return module


GOOD = plugin(maskhooks_gates={"good": Bernoulli})


# Three doors


def test_register_and_unregister() -> None:
    registry = Registry()
    assert registry.register(ProbeAdapter) is ProbeAdapter
    assert "probe" in [adapter.name for adapter in registry.listed(ADAPTERS)]
    report = registry.reports[-1]
    assert (report.name, report.distribution, report.offers) == (
        "probe",
        "(registered by hand)",
        [("adapter", "probe", "Finds a probe.")],
    )
    registry.unregister("probe")
    assert "probe" not in [adapter.name for adapter in registry.listed(ADAPTERS)]
    assert "probe" not in [report.name for report in registry.reports]
    registry.register(ProbeAdapter())


def test_register_as_a_decorator_reaches_wrap() -> None:
    @maskhooks.register
    class Mine(ProbeAdapter):
        name = "mine"

    try:
        hooked = maskhooks.wrap(nn.Sequential(Probe()))
        assert [str(site) for site in hooked.sites] == ["0:output"]
    finally:
        maskhooks.unregister("mine")
    assert len(maskhooks.wrap(nn.Sequential(Probe())).sites) == 0


@pytest.mark.parametrize("adapter", [ProbeAdapter(), ProbeAdapter, [ProbeAdapter()]])
def test_adapter_for_one_call(adapter: Any) -> None:
    assert [str(site) for site in maskhooks.wrap(Probe(), adapter=adapter).sites] == [":output"]


def test_register_a_task_and_a_module() -> None:
    registry = Registry()

    class Mine(Task):
        name = "mine"

    registry.register(Mine())
    registry.register(plugin(maskhooks_gates={"always": Bernoulli}), name="gates")
    assert [task.name for task in registry.listed(TASKS) if task.name == "mine"] == ["mine"]
    assert registry.parts(GATES)["always"] is Bernoulli


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = loaded(monkeypatch, Package("third_party", good=GOOD))
    (report,) = registry.reports
    assert (report.name, report.distribution, report.version) == ("good", "third_party", "9.9")
    assert report.offers == [("gate", "good", "z = 1 with probability sigmoid(a), else 0.")]
    assert registry.parts(GATES) == {"good": Bernoulli}


def test_built_ins_come_through_the_same_door() -> None:
    registry = Registry()
    assert {"hard-concrete", "hard-concrete-louizos", "bernoulli"} <= set(registry.parts(GATES))
    assert {"learned", "zero", "mean", "token"} <= set(registry.parts(BASELINES))
    report = next(report for report in registry.reports if report.name == "builtin")
    assert report.distribution == "maskhooks"
    assert ("gate", "hard-concrete") in [(offer.kind, offer.name) for offer in report.offers]
    assert all(offer.line for offer in report.offers)


def test_every_hook_has_a_kind_that_the_registry_knows() -> None:
    Registry().load()
    specs = {name for name in vars(hookspecs) if name.startswith("maskhooks_")}
    assert set(declared) == specs
    assert all(kind.hook == hook for hook, kind in declared.items())


def test_make() -> None:
    registry = Registry()
    assert registry.make(GATES, "hard-concrete", temperature=0.5) == HardConcrete(0.5)
    assert registry.make(GATES, "hard-concrete-louizos") == HardConcrete.louizos()
    gate = Bernoulli()
    assert registry.make(GATES, gate) is gate
    with pytest.raises(
        UnknownNameError, match=r"no gate is named 'hard-concret'\. The gates are bernoulli.*Did you mean"
    ):
        registry.make(GATES, "hard-concret")


# What is broken is reported, and ends nothing


BROKEN = {
    "raises": (ZeroDivisionError("at import"), "ZeroDivisionError: at import"),
    "missing": (ModuleNotFoundError("No module named 'x'"), "No module named 'x'"),
    "misspelt": (
        plugin(maskhooks_gate={"x": Bernoulli}),
        "implements 'maskhooks_gate', but there is no such hook. Did you mean 'maskhooks_gates'?",
    ),
    "empty": (ModuleType("empty"), "implements no hook of maskhooks"),
    "list": (plugin(maskhooks_gates=[Bernoulli]), "It must return a mapping from name to gate"),
    "others": (plugin(maskhooks_gates={"x": Zero}), "It must return a mapping from name to gate"),
    "class": (plugin(maskhooks_sources={"x": Factory}), "It must return a mapping from name to source"),
    "neither": (plugin(maskhooks_sources={"x": 1}), "It must return a mapping from name to source"),
    "classes": (plugin(maskhooks_adapters=[ProbeAdapter]), "It must return a list of Adapter objects"),
    "nothing": (plugin(maskhooks_tasks=None), "It must return a list of Task objects"),
    "clash": (plugin(maskhooks_gates={"good": Bernoulli}), "offers the gate 'good', but that name is taken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_third_party_plugin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, message = BROKEN[name]
    found = (
        Package("first", good=GOOD),
        Package("bad", **{name: broken}),
        Package("last", fine=plugin(maskhooks_gates={"fine": Bernoulli})),
    )
    with pytest.warns(PluginWarning, match=f"plugin '{name}' of bad 9.9 was not loaded") as warned:
        registry = loaded(monkeypatch, *found)
    assert len(warned) == 1
    assert message in str(warned[0].message)
    assert [report.error != "" for report in registry.reports] == [False, True, False]
    assert message in registry.reports[1].error
    assert set(registry.parts(GATES)) == {"good", "fine"}
    assert not registry.manager.has_plugin(name)
    registry.register(ProbeAdapter)  # a misspelt hook left behind would fail this


@pytest.mark.parametrize("name", ["misspelt", "raises"])
def test_a_broken_plugin_of_ours_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((PluginError, ZeroDivisionError)):
        loaded(monkeypatch, Package("maskhooks", **{name: BROKEN[name][0]}))


def test_our_adapter_for_a_library_that_is_not_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(PluginWarning):
        registry = loaded(monkeypatch, Package("maskhooks", x=ImportError("no library")))
    assert registry.reports[0].error == "ImportError: no library"


def test_two_packages_with_one_plugin_name(monkeypatch: pytest.MonkeyPatch) -> None:
    other = plugin(maskhooks_gates={"other": Bernoulli})
    with pytest.warns(PluginWarning, match="plugin 'good' of second 9.9 was not loaded: NameTakenError"):
        registry = loaded(monkeypatch, Package("first", good=GOOD), Package("second", good=other))
    assert set(registry.parts(GATES)) == {"good"}


def test_one_package_found_twice_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry = loaded(monkeypatch, Package("first", good=GOOD), Package("first", good=GOOD))
    assert len(registry.reports) == 1


FIRST = """
import importlib.metadata, sys, types
from maskhooks import hookimpl

@hookimpl
def maskhooks_sources():
    from maskhooks.model.source import Factory
    return {"first": Factory()}

module = types.ModuleType("found_first")
module.maskhooks_sources = maskhooks_sources
sys.modules["found_first"] = module

class First(importlib.metadata.Distribution):
    def read_text(self, name):
        return {"METADATA": "Name: first", "entry_points.txt": "[maskhooks]\\nfirst = found_first"}.get(name)
    def locate_file(self, path):
        raise NotImplementedError

others = [*importlib.metadata.distributions()]
importlib.metadata.distributions = lambda: iter([First(), *others])
from maskhooks.plugins.registry import registry
registry.load()
for report in registry.reports:
    if report.name == "first":
        print(report.error, *[(offer.kind, offer.name) for offer in report.offers])
print(registry.reports[0].distribution)
"""


def test_a_package_found_before_ours_offers_any_kind_of_part() -> None:
    """No other import has declared the kind, and ours is loaded first all the same."""
    assert printed_by(FIRST).splitlines() == [" ('source', 'first')", "maskhooks"]


# By hand, what is wrong raises


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    registry = loaded(monkeypatch)
    registry.register(plugin(maskhooks_gates={"good": Bernoulli}), name="first")
    yield registry
    assert set(registry.parts(GATES)) == {"good"}  # nothing half registered is left
    assert [report.name for report in registry.reports] == ["first"]


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (
            plugin(maskhooks_gates={"good": Bernoulli}),
            NameTakenError,
            "the gate 'good', but that name is taken",
        ),
        (
            plugin(maskhooks_gatez={}),
            PluginError,
            r"'maskhooks_gatez'.*Did you mean 'maskhooks_gates'\? The hooks are maskhooks_adapters",
        ),
        (object(), PluginError, "an object of type object, implements no hook"),
        (ModuleType("empty"), PluginError, r"a module, implements no hook.*@maskhooks.hookimpl"),
    ],
)
def test_what_cannot_be_registered(registry: Registry, part: Any, error: type[PluginError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        registry.register(part, name="second")
    assert raised.value.plugin == "second"
    assert not registry.manager.has_plugin("second")


def test_a_hook_with_arguments_that_do_not_exist(registry: Registry) -> None:
    class Odd:
        @hookimpl
        def maskhooks_gates(self, colour: str) -> dict[str, Any]:
            return {}

    with pytest.raises(PluginError, match=r"(?s)plugin 'odd' has a hook with wrong arguments.*colour"):
        registry.register(Odd(), name="odd")


def test_an_optional_hook_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later:
        @hookimpl(optionalhook=True)
        def maskhooks_dreams(self) -> list[str]:
            return ["electric sheep"]

    registry = loaded(monkeypatch)
    registry.register(Later(), name="later")
    assert registry.reports[-1].offers == []


def test_a_name_in_use(registry: Registry) -> None:
    with pytest.raises(NameTakenError, match=r"maskhooks.unregister\('first'\)"):
        registry.register(GOOD, name="first")


def test_one_object_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = loaded(monkeypatch)
    registry.register(GOOD, name="one")
    with pytest.raises(NameTakenError, match="plugin 'two' is already registered, as 'one'"):
        registry.register(GOOD, name="two")


def test_unregister_what_is_not_there(registry: Registry) -> None:
    with pytest.raises(UnknownNameError, match=r"no plugin 'frist' is registered\. Did you mean 'first'"):
        registry.unregister("frist")
