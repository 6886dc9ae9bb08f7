"""The hooks that a plugin may implement. Each returns new parts, under names that are not taken.

from maskhooks import hookimpl

@hookimpl
def maskhooks_gates():
    return {"always-open": AlwaysOpen}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pluggy

hookspec = pluggy.HookspecMarker("maskhooks")
hookimpl = pluggy.HookimplMarker("maskhooks")


@hookspec
def maskhooks_adapters() -> Sequence[object]:  # type: ignore[empty-body]
    """Return adapters, which find sites in modules of the types they claim."""


@hookspec
def maskhooks_tasks() -> Sequence[object]:  # type: ignore[empty-body]
    """Return tasks, which say how to call models of the types they claim and what the outputs mean."""


@hookspec
def maskhooks_gates() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return gates by name, each as a callable that makes one."""


@hookspec
def maskhooks_baselines() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return baselines by name, each as a callable that makes one."""


@hookspec
def maskhooks_probes() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return probes by name, each as a callable that makes one."""


@hookspec
def maskhooks_objectives() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return objectives by name, each as a callable that makes one for a margin."""


@hookspec
def maskhooks_penalties() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return penalties by name, each as a callable that makes one."""


@hookspec
def maskhooks_optimizers() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return optimizers by name, each as a callable that makes one for groups of parameters."""


@hookspec
def maskhooks_divergences() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return divergences by name, each a function of the original and the masked outputs."""


@hookspec
def maskhooks_recipes() -> Mapping[str, object]:  # type: ignore[empty-body]
    """Return recipes by name, each the settings of a training run."""


@hookspec
def maskhooks_explainers() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return explainers by name, each as a class that takes a `Hooked` and settings."""


@hookspec
def maskhooks_metrics() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Return metrics by name, each as a class that takes settings."""


@hookspec
def maskhooks_sources() -> Mapping[str, object]:  # type: ignore[empty-body]
    """Return sources by name, which open the MODEL given on the command line."""
