"""The adapter for the messages of every `MessagePassing` layer, with the states and nodes that they connect."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from maskhooks.errors import CompiledModelError
from maskhooks.hooks.several_parts import Parts
from maskhooks.model.adapter import Adapter, join
from maskhooks.model.task import Task
from maskhooks.sites.modules import places
from maskhooks.sites.pattern import Pattern
from maskhooks.sites.site import Site
from maskhooks_geometric.graphs import untyped
from maskhooks_geometric.layer import PLACES, cached, sending
from maskhooks_geometric.loaded import layer_types
from maskhooks_geometric.task import GraphTask
from maskhooks_geometric.whole import PLACES as WHOLE
from maskhooks_geometric.whole import weighing

_PICKED = frozenset({"picked", "read"})
_EDGE, _NODE = Pattern("edge feature -> edge"), Pattern("node feature -> node")


class GeometricAdapter(Adapter):
    """Finds the messages of each PyTorch Geometric layer, with the source state, target state and edge of each.

    The sites of a layer are `message` and, with the same rows, `source`, `target` and `edges`.

    A row is one message, its heads and other axes flattened. Messages of several calls of `propagate` in one pass (the
    relations of R-GCN, a layer used twice) are concatenated along the rows. `source` and `target` are the states, from
    the layer's input, of the nodes that send and receive each message. `edges` identifies these nodes: integer rows of
    source, target, relation and whether the layer's flow runs against its edges. The input of `source` and `target` is
    what their rows are gathered from: the states of nodes, and the node index of each row.

    For the whole model, `edge` is a weight of 1 for each edge, which all layers give the messages along it: an edge in
    every layer at once. Self-loops that a layer adds are not edges. With it come `edge_source`, `edge_target` (states
    from the input of the first layer with these edges; several edge lists are zero-padded to the widest) and
    `edge_ends`.

    Tags: `edge` and `weight`; `message`; `source`, `target` and `edges`, which are also tagged `read` because they are
    read-only, and the first two `picked`; `node` for a layer's inputs and outputs, `hidden` for the outputs, `input`
    for the input of the first layer. A module with a child of one of these names has no such sites.

    Depths number the layers, in the order of modules, or of calls if an example was run. Layers that each serve one
    edge type, side by side in a `HeteroConv` or by `to_hetero`, share a depth.
    """

    name = "geometric"
    claims_model = True

    def types(self) -> tuple[type[nn.Module], ...]:
        return layer_types()

    def sites(self, name: str, module: nn.Module) -> Iterator[Site]:
        if _free(module, WHOLE):
            yield Site(join(name, "edge_ends"), tags=frozenset({"edges", "read"}))
            for place in ("source", "target"):
                yield Site(join(name, f"edge_{place}"), pattern=_EDGE, tags=frozenset({place, "read"}), optional=True)
            yield Site(join(name, "edge"), pattern=_EDGE, tags=frozenset({"edge", "weight"}))
        for inner, layer in layers(name, module).items():
            yield Site(inner, "input", pattern=_NODE, tags=frozenset({"node"}), optional=True)
            if _free(layer, PLACES):
                yield Site(join(inner, "edges"), tags=frozenset({"edges", "read"}))
                for place in ("source", "target"):  # a layer may get no states, or none of receiving nodes
                    yield Site(join(inner, place), pattern=_EDGE, tags=_PICKED | {place}, optional=True)
                yield Site(join(inner, "message"), pattern=_EDGE, tags=frozenset({"message"}))
            yield Site(inner, pattern=_NODE, tags=frozenset({"node", "hidden"}), optional=True)

    def complete_sites(self, sites: Sequence[Site], fired: Sequence[Site] = ()) -> Sequence[Site]:
        order = dict.fromkeys(untyped(_layer(site)) for site in (*fired, *sites) if not _is_whole(site))
        depths = {layer: depth for depth, layer in enumerate(order)}
        placed = []
        for site in sites:
            depth = 0 if _is_whole(site) else depths[untyped(_layer(site))]
            first = site.port == "input" and not depth
            tags = site.tags | {"input"} if first else site.tags - {"input"}
            placed.append(dataclasses.replace(site, depth=depth, tags=tags))
        return sorted(placed, key=lambda site: site.depth or 0)

    def task(self, model: nn.Module) -> Task:
        return GraphTask().serve(model)

    def places(self, module: nn.Module) -> dict[str, nn.Module]:
        for inner in layers("", module).values():
            for place in PLACES:
                places(inner).setdefault(place, Parts(apart=place != "message"))
        return {place: Parts(widened=place in ("edge_source", "edge_target")) for place in WHOLE}

    def expose_sites(
        self, name: str, module: nn.Module, sites: Sequence[Site]
    ) -> contextlib.AbstractContextManager[None]:
        wanted = {site.module for site in sites}
        ends = [site.module.rpartition(".") for site in sites]
        within = {inner for inner, _, place in ends if place in PLACES}
        everywhere = any(join(name, place) in wanted for place in WHOLE)
        with contextlib.ExitStack() as stack:
            whole = stack.enter_context(weighing(module, layers(name, module))) if everywhere else None
            for inner, layer in layers(name, module).items():
                if everywhere or inner in within:
                    stack.enter_context(sending(layer, whole))
            return _closing(stack.pop_all())

    def while_tapped(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        kinds = layer_types()
        return cached(part for part in module.modules() if isinstance(part, kinds))


def layers(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """The message passing layers in a module, itself included, by their names in the whole model.

    Raises:
        CompiledModelError: one of them is scripted, which hides its messages.
    """
    kinds = layer_types()
    for inner, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and hasattr(part, "propagate"):
            raise CompiledModelError(
                f"the layer {join(name, inner)!r}, a {part.original_name}, is scripted. Its messages are hidden, and "
                "masks would miss them. Wrap the model before torch.jit.script",
                module=join(name, inner),
            )
    return {join(name, inner): part for inner, part in module.named_modules() if isinstance(part, kinds)}


def _free(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module has no child of these names; addresses would mean that child."""
    return not any(name in names for name, _ in module.named_children())


def _is_whole(site: Site) -> bool:
    """Whether a site stands for all layers."""
    return site.module.rpartition(".")[2] in WHOLE and "node" not in site.tags


def _layer(site: Site) -> str:
    """The name of a site's layer."""
    parent, _, child = site.module.rpartition(".")
    return parent if child in PLACES and "node" not in site.tags else site.module


@contextlib.contextmanager
def _closing(stack: contextlib.ExitStack) -> Iterator[None]:
    with stack:
        yield
