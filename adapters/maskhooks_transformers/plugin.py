"""Registers the Hugging Face adapter, task and source. Importing this does not import transformers."""

from __future__ import annotations

from collections.abc import Mapping

from maskhooks.model.adapter import Adapter
from maskhooks.model.source import Source
from maskhooks.model.task import Task
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_transformers.adapter import TransformersAdapter
from maskhooks_transformers.source import TransformersSource
from maskhooks_transformers.task import TransformersTask


@hookimpl
def maskhooks_adapters() -> list[Adapter]:
    return [TransformersAdapter()]


@hookimpl
def maskhooks_tasks() -> list[Task]:
    return [TransformersTask()]


@hookimpl
def maskhooks_sources() -> Mapping[str, Source]:
    return {"transformers": TransformersSource()}
