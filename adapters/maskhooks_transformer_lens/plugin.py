"""Registers the adapter and the task for TransformerLens. Importing this does not import TransformerLens."""

from __future__ import annotations

from maskhooks.model.adapter import Adapter
from maskhooks.model.task import Task
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_transformer_lens.adapter import LensAdapter
from maskhooks_transformer_lens.task import LensTask


@hookimpl
def maskhooks_adapters() -> list[Adapter]:
    return [LensAdapter()]


@hookimpl
def maskhooks_tasks() -> list[Task]:
    return [LensTask()]
