"""The task: how graphs become a call, which graph a message belongs to, and what predictions mean."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from maskhooks.errors import BatchError, SettingError
from maskhooks.model.adapter import join
from maskhooks.model.outputs import Outputs, Positions
from maskhooks.model.task import Task, device_of
from maskhooks.sites.signature import signature
from maskhooks.sites.site import Site
from maskhooks_geometric.checks import check
from maskhooks_geometric.graphs import Graphs, Relation
from maskhooks_geometric.heads import LEVELS, distribution, named
from maskhooks_geometric.messages import Messages
from maskhooks_geometric.sent import Sent
from maskhooks_geometric.whole import passing

_messages = WeakTensorKeyDictionary()  # by what was read of them; each pass reads anew
_FOR_LINKS = ("edge_label_index", "edge_label")
_ALIKE = {"edge_index": "adj_t", "adj_t": "edge_index", "edge_weight": "edge_attr"}


class GraphTask(Task):
    """A batch is PyG's `Data`, `HeteroData` or a batch of them, a mapping, or a tuple of arguments.

    Data objects are taken apart by the names of the model's arguments; a model that takes one argument with no such
    name gets the whole. An example is a graph.

    Args:
        level: what predictions are about: "node", "link" or "graph". Default: by their number.
        index: `batch -> numbers` of the nodes or links whose predictions count. Default: `node_index` or `link_index`
            of the batch, the nodes that a NeighborLoader began with, or all.
        pairs: `batch -> nodes`, two rows: the pairs that predictions for links are about. Default: `edge_label_index`.
        units: "undirected" gates messages between the same two nodes together, in both directions; or a function, see
            `Task`.
    """

    name = "graph"
    options = (*Task.options, "level", "index", "pairs")
    _level: str | None = None
    _index: Callable[[Any], Tensor] | None = None
    _pairs: Callable[[Any], Tensor] | None = None
    _parameters: tuple[str, ...] = ()
    _required: frozenset[str] = frozenset()
    _open = True  # whether the model takes arguments of any name

    def serve(self, model: nn.Module) -> GraphTask:
        task = copy.copy(self)
        every = signature(model).parameters.values()
        named = [part for part in every if part.kind not in (part.VAR_KEYWORD, part.VAR_POSITIONAL)]
        task._parameters = tuple(part.name for part in named)
        task._required = frozenset(part.name for part in named if part.default is part.empty)
        task._open = len(named) < len(every)
        return task

    def with_options(self, functions: Mapping[str, Any]) -> Task:
        level = functions.get("level")
        if level is not None and level not in LEVELS:
            raise BatchError(f"level={level!r} is none of {', '.join(LEVELS)}, which predictions may be about")
        units = functions.get("units")
        if isinstance(units, str) and units != "undirected":
            raise SettingError(f"units={units!r}: it is 'undirected', or a function of the batch")
        return super().with_options(functions)

    @property
    def level(self) -> str | None:
        """What predictions are about, where it was given."""
        return self._level

    def chosen(self, batch: Any, level: str) -> Tensor | None:
        """The numbers of the nodes or links whose predictions count; None where all do."""
        given = None if self._index is None else torch.as_tensor(self._index(batch))
        return named(self.graphs(batch), level) if given is None else given

    def graphs(self, batch: Any) -> Graphs:
        """What a batch says of its graphs."""
        return Graphs(batch, self._parameters, self._pairs)

    def call(self, model: nn.Module, batch: Any) -> Any:
        if self._call is None:
            check(self.graphs(batch), device_of(model))
        with passing(model):
            return super().call(model, batch)

    def arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        graphs = self.graphs(batch)
        if isinstance(batch, (tuple, list, Tensor)) or (isinstance(batch, Mapping) and self._open):
            return super().arguments(model, batch)
        if not self._parameters:  # as a HeteroConv alone takes any
            return tuple(graphs.get(f"{name}_dict" if graphs.hetero else name) for name in ("x", "edge_index")), {}
        found = {name: self._argument(graphs, name) for name in self._parameters}
        missing = [name for name in self._required if found[name] is None]
        if missing and len(self._parameters) == 1:
            return (batch,), {}
        if missing:
            raise BatchError(
                f"{type(model).__name__}.forward needs {', '.join(missing)}, which the batch does not hold. Name them "
                f"so in the batch, or say how to call it: wrap(model, call=lambda model, data: model(data.x, ...))"
            )
        return (), {name: value for name, value in found.items() if value is not None}

    def _argument(self, graphs: Graphs, name: str) -> Any:
        if name == "batch_size":  # to PyG's models the number of graphs, to its loaders that of seeds
            seeds = graphs.seeds[1] if graphs.seeds is not None and name in self._required else None
            return graphs.count if graphs.graph_of() is not None and seeds is None else seeds
        own = graphs.get(name)
        if own is None and graphs.hetero:  # as a model made by to_hetero calls its arguments
            own = graphs.for_links(name) if name in _FOR_LINKS else graphs.get(f"{name}_dict")
        if own is not None or name not in _ALIKE:
            return own
        other = graphs.get(_ALIKE[name])
        if name == "edge_weight" and isinstance(other, Tensor) and other.dim() > 1:
            return None  # features are no weights
        return other

    def distribution(self, result: Any, batch: Any) -> Outputs:
        if self._output is not None:
            return super().distribution(result, batch)
        chosen = None if self._index is None else torch.as_tensor(self._index(batch))
        return super().distribution(distribution(result, self.graphs(batch), self._level, chosen), batch)

    def dependencies(self, site: Site) -> Sequence[Site]:
        return _beside(site)

    def example_index(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, " row"] | None:
        axis = _axis(site)
        if self._example_index is not None or axis is None or (axis == "edge" and not self.dependencies(site)):
            return super().example_index(site, batch, values)
        graphs = self.graphs(batch)
        if axis == "node":
            relation = _relation(graphs, site)
            whose = graphs.graph_of(relation and relation[2])
            return torch.zeros(len(values[str(site)]), dtype=torch.long) if graphs.single or whose is None else whose
        messages = self.messages(batch, site, values)
        if not len(messages.sent) and not graphs.connected:
            raise BatchError(
                f"site {site}: no message was sent, as the batch holds no edge that this layer uses. Leave graphs "
                "without edges out, or mask another layer"
            )
        found = messages.graph()
        if found is None:
            raise BatchError(
                f"site {site}: the layer has other nodes than the batch, as after pooling, so it is not known whose "
                "its messages are. Explain one graph at a time, mask an earlier layer, or say it: "
                "wrap(model, example_index=lambda batch, site: ...)"
            )
        return found

    def edges(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Mapping[str, Int[Tensor, " row"]] | None:
        """Columns source, target, relation where there are several, and edge: the edge's number in its graph, or in the
        graph that this one was sampled from (`e_id`).

        `edge` is -1 for messages along no edge of the batch, such as a self-loop that the layer added.
        """
        if self._edges is not None or not self.dependencies(site):
            return super().edges(site, batch, values)
        return self.messages(batch, site, values).columns()

    def units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, "*positions"] | None:
        """What goes along the same edge, in both directions, where `units="undirected"`; nodes are by themselves."""
        if not isinstance(self._units, str) or self._edges is not None:
            return super().units(site, batch, values)
        return self.messages(batch, site, values).undirected if self.dependencies(site) else None

    def messages(self, batch: Any, site: Site, values: Mapping[str, Tensor]) -> Messages:
        """The messages of a site, made once for what a pass has read there."""
        (edges,) = self.dependencies(site)
        sent = values[str(edges)]
        found: Messages | None = _messages.get(sent)
        if found is None or found.graphs.batch is not batch:
            graphs = self.graphs(batch)
            found = _messages[sent] = Messages(graphs, Sent.of(sent.detach()), _relation(graphs, site))
        return found

    def select_rows(self, batch: Any, numbers: Sequence[int]) -> Any | None:
        if self._select is not None or not hasattr(batch, "stores"):
            return super().select_rows(batch, numbers)
        from torch_geometric.data import Batch

        try:
            own = batch.to_data_list() if isinstance(batch, Batch) else [batch]
        except RuntimeError:  # as of a batch that was not made of a list
            return None
        return Batch.from_data_list([own[number] for number in numbers]) if max(numbers) < len(own) else None

    def perturb(self, batch: Any, generator: Generator) -> Any | None:
        """The same graphs with the features of their nodes, and of their edges, in another order."""
        if self._perturb is not None or isinstance(batch, (Mapping, tuple, list, Tensor)):
            return super().perturb(batch, generator)
        varied, changed = batch.clone(), False
        for store in varied.stores:
            for name in ("x", "edge_attr", "edge_weight", "pos"):
                value = store.get(name) if hasattr(store, "get") else None
                if isinstance(value, Tensor) and value.is_floating_point():
                    store[name] = value[torch.randperm(len(value), generator=generator).to(value.device)]
                    changed |= not torch.equal(store[name], value)
        return varied if changed else None

    def predictions(self, result: Outputs) -> Sequence[str] | None:
        return None if isinstance(result, Positions) else super().predictions(result)

    def targets(self, batch: Any) -> Sequence[str] | None:
        graphs = self.graphs(batch)
        if graphs.pairs is not None and (label := graphs.for_links("edge_label")) is not None:
            classes = not label.is_floating_point() or bool((label == label.round()).all())
            y, whose = label.long() if classes else label, graphs.graph_of_links()
            y = y if whose is None else y[whose.argsort(stable=True)]
        else:
            y, index = graphs.get("y"), named(graphs, "node")
            if isinstance(y, Tensor) and index is not None and len(y) == graphs.nodes() != graphs.count:
                y = y[index.to(y.device)]
        fits = isinstance(y, Tensor) and y.numel() == graphs.count and not y.is_floating_point()
        return [str(label) for label in y.reshape(-1).tolist()] if fits else None


@functools.lru_cache(maxsize=1024)  # asked for each site in every pass
def _beside(site: Site) -> tuple[Site, ...]:
    """The site that says which nodes a site's edges connect, where these are edges of ours."""
    parent, _, child = site.module.rpartition(".")
    ends = {"edge": "edge_ends", "edge_source": "edge_ends", "edge_target": "edge_ends"}.get(child, "edges")
    ours = (child in ("message", "source", "target") or ends != "edges") and _axis(site) == "edge"
    return (Site(join(parent, ends), call=site.call),) if ours else ()


def _axis(site: Site) -> str | None:
    """What a site's rows are: edges, nodes, or neither."""
    first = site.pattern.positions[:1] if site.pattern is not None else ()
    return first[0] if first in (("edge",), ("node",)) else None


def _relation(graphs: Graphs, site: Site) -> Relation | None:
    """The type of edges of a layer that serves one, by its name in the model; None where it serves all."""
    if not graphs.relations:
        return None
    name = _plain(f"_{site.module}_")
    found = [relation for relation in graphs.relations if _plain(f"_{'__'.join(relation)}_") in name]
    return max(found, key=lambda relation: len("_".join(relation)), default=None)


def _plain(name: str) -> str:
    """A name without what PyG puts between the parts of a type."""
    return re.sub(r"[^0-9A-Za-z]+|_+", "_", name)
