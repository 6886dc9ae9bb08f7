"""The registered parts, and those of the example plugin: third-party parts pass the same lists as ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import maskhooks
from maskhooks.plugins.kind import Kind
from maskhooks.plugins.registry import registry

_EXAMPLE = Path(__file__).parents[1] / "plugins" / "example"
_NAME = "contract-example"


def _example() -> ModuleType:
    sys.path.insert(0, str(_EXAMPLE))
    try:
        return importlib.import_module("maskhooks_example.plugin")
    finally:
        sys.path.remove(str(_EXAMPLE))


@pytest.fixture(scope="module")
def third_party() -> Iterator[None]:
    """The example plugin, registered by hand for as long as a file's tests run."""
    maskhooks.register(_example(), name=_NAME)
    yield
    maskhooks.unregister(_NAME)


def registered(kind: Kind[Any]) -> list[str]:
    """The names of all parts of a kind, the example plugin's among them."""
    maskhooks.register(_example(), name=_NAME)
    try:
        return sorted(registry.parts(kind))
    finally:
        maskhooks.unregister(_NAME)
