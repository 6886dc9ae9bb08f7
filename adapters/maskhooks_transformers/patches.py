"""Names the positions of an image's hidden states by row and column."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maskhooks.sites.site import Site
from maskhooks_transformers import axes, flow
from maskhooks_transformers.flow import State

_MOST = 16  # positions before the patches, such as a class token and registers
_SCALES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Grid:
    """How the patches of a hidden state are laid out.

    Attributes:
        size: pixels from one patch to the next.
        extra: positions before the patches.
    """

    size: int
    extra: int

    def names(self, height: int, width: int) -> list[str] | None:
        """The names of the positions of an image of this size in pixels; None if patches do not tile it."""
        if height % self.size or width % self.size:
            return None
        rows, columns = height // self.size, width // self.size
        extra = ["[CLS]", *(f"[extra {number}]" for number in range(1, self.extra))][: self.extra]
        return [*extra, *(f"({row}, {column})" for row in range(rows) for column in range(columns))]


class Patches:
    """The grids of a model's states that have all patches in one axis, found in one pass over a sample."""

    def __init__(self, grids: Mapping[tuple[str, str], Grid]) -> None:
        self.grids = dict(grids)

    @classmethod
    def of(cls, model: nn.Module) -> Patches:
        """The grids of an image model; empty for other models, and for those that accept no sample."""
        if getattr(model, "main_input_name", None) == "pixel_values":
            with contextlib.suppress(Exception):  # the model's own code may raise anything; then there are no names
                return cls(_grids(flow.trace(model)))
        return cls({})

    def names(self, site: Site, batch: Mapping[str, Any]) -> list[list[str]] | None:
        """The names of the positions of each image; None for sites without a grid."""
        pixels, grid = batch.get("pixel_values"), self.grids.get((site.module, site.port))
        if grid is None or not isinstance(pixels, Tensor) or pixels.dim() != 4:
            return None
        found = grid.names(*pixels.shape[-2:])
        if found is None or (site.shape is not None and len(found) != site.shape[site.gating().axes.index(("patch",))]):
            return None
        return [found] * len(pixels)


def _grids(seen: flow.Pass) -> dict[tuple[str, str], Grid]:
    if seen.kind != "patch":
        return {}
    whole = next(call.takes for call in seen.calls if call.name == "")
    maps = [call.gives for call in seen.calls if call.gives is not None and call.gives.tensor.dim() == 4]
    first = next((state.tensor for state in maps if _is_map(state)), None)
    if whole is None or first is None or whole.tensor.dim() != 4:
        return {}
    side, across = whole.tensor.shape[-1], first.shape[-1]
    found: dict[tuple[str, str], Grid] = {}
    for call in seen.calls:
        for port, state in (("input", call.takes), ("output", call.gives)):
            if state is not None and axes.names(state.tensor.shape, seen.kind) == ("batch", "patch", "hidden"):
                grid = _grid(state.tensor.shape[1], side, across)
                if grid is not None:
                    found[call.name, port] = grid
    return found


def _is_map(state: State) -> bool:
    return axes.names(state.tensor.shape, "patch") == ("batch", "channel", "height", "width")


def _grid(length: int, side: int, across: int) -> Grid | None:
    """The finest grid that fits a number of positions: patches as wide as the first map's, or merged ones."""
    for scale in _SCALES:
        places = (across // scale) ** 2
        if across % scale == 0 and side % across == 0 and 0 <= length - places <= _MOST:
            return Grid(side // across * scale, length - places)
    return None
