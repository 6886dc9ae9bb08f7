"""Registers the adapter for torch's recurrent modules."""

from __future__ import annotations

from maskhooks.model.adapter import Adapter
from maskhooks.plugins.hookspecs import hookimpl
from maskhooks_recurrent.adapter import RecurrentAdapter


@hookimpl
def maskhooks_adapters() -> list[Adapter]:
    return [RecurrentAdapter()]
