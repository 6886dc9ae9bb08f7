"""The hooks a plugin may implement. Each returns new parts; names must be free.

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
    """Adapters, which find sites in modules of the types they claim."""


@hookspec
def maskhooks_tasks() -> Sequence[object]:  # type: ignore[empty-body]
    """Tasks, which say how models of the types they claim are called and what their outputs mean."""


@hookspec
def maskhooks_gates() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Gates by name, each a callable that makes one."""


@hookspec
def maskhooks_baselines() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Baselines by name, each a callable that makes one."""


@hookspec
def maskhooks_probes() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Probes by name, each a callable that makes one."""


@hookspec
def maskhooks_objectives() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Objectives by name, each a callable that makes one for a margin."""


@hookspec
def maskhooks_penalties() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Penalties by name, each a callable that makes one."""


@hookspec
def maskhooks_optimizers() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Optimizers by name, each a callable that makes one for groups of parameters."""


@hookspec
def maskhooks_divergences() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Divergences by name, each a function of the original and the masked outputs."""


@hookspec
def maskhooks_recipes() -> Mapping[str, object]:  # type: ignore[empty-body]
    """Recipes by name: the settings of a training run."""


@hookspec
def maskhooks_explainers() -> Mapping[str, Callable[..., object]]:  # type: ignore[empty-body]
    """Explainers by name, each a class made with a `Hooked` and settings."""


@hookspec
def maskhooks_sources() -> Mapping[str, object]:  # type: ignore[empty-body]
    """Sources by name, which open a model and its data from words on the command line."""
