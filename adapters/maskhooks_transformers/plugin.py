"""Registers the Hugging Face adapter and task. Importing this does not import transformers."""

from __future__ import annotations

from maskhooks.adapter import Adapter
from maskhooks.hookspecs import hookimpl
from maskhooks.task import Task
from maskhooks_transformers.adapter import TransformersAdapter
from maskhooks_transformers.task import TransformersTask


@hookimpl
def maskhooks_adapters() -> list[Adapter]:
    return [TransformersAdapter()]


@hookimpl
def maskhooks_tasks() -> list[Task]:
    return [TransformersTask()]
