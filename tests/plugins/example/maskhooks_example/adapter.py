"""Finds the sites of `Pyramid` models."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from maskhooks.model.adapter import Adapter, join
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site

_PATTERN = Pattern("batch feature -> batch feature")


class PyramidAdapter(Adapter):
    """The output of each storey, wherever a pyramid stands in a model."""

    name = "pyramid"

    def types(self) -> tuple[type[nn.Module], ...]:
        library = sys.modules.get("maskhooks_example.pyramid")  # who has a pyramid has imported its library
        return (library.Pyramid,) if library else ()

    def sites(self, name: str, module: nn.Module) -> Iterable[Site]:
        for child, _ in module.get_submodule("storeys").named_children():
            storey = join(name, f"storeys.{child}")
            yield Site(storey, pattern=_PATTERN, tags=frozenset({"hidden"}))
