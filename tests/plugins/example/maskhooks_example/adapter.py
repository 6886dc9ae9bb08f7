"""Finds the sites of `Pyramid` models."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from maskhooks.model.adapter import Adapter, join
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site


class PyramidAdapter(Adapter):
    """The output of each storey, unit by unit, wherever a pyramid stands in a model."""

    name = "pyramid"

    def types(self) -> tuple[type[nn.Module], ...]:
        library = sys.modules.get("maskhooks_example.pyramid")  # who has a pyramid has imported its library
        return (library.Pyramid,) if library else ()

    def sites(self, name: str, module: nn.Module) -> Iterable[Site]:
        for child, storey in module.get_submodule("storeys").named_children():
            units = Pattern("batch unit -> batch unit", {"unit": storey.out_features})
            yield Site(join(name, f"storeys.{child}"), pattern=units, tags=frozenset({"hidden"}))
