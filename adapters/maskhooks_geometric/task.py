"""The task for graphs: how to call the model, which graph a message belongs to, and what predictions mean."""

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

_messages = WeakTensorKeyDictionary()  # by the value read from the site; each pass reads a new one
_FOR_LINKS = ("edge_label_index", "edge_label")
_ALIKE = {"edge_index": "adj_t", "adj_t": "edge_index", "edge_weight": "edge_attr"}


class GraphTask(Task):
    """Knows how to call a graph network, which node, edge or graph each row is, and what the outputs mean.

    A batch is PyG's `Data`, `HeteroData` or a batch of them, a mapping, or a tuple of arguments. The names of the
    model's arguments select the fields of a data object; a model with one argument of another name gets the whole
    object. An example is a graph.

    Args:
        level: what predictions are about: "node", "link" or "graph". Default: by their number.
        index: `batch -> indices` of the nodes or links whose predictions count. Default: `node_index` or `link_index`
            of the batch, the seed nodes of a NeighborLoader, or all.
        pairs: `batch -> nodes`, two rows: the pairs that link predictions are about. Default: `edge_label_index`.
        units: "undirected" gives both directions between two nodes one gate; or a function, see `Task`.
    """

    name = "graph"
    recipe = "graph"
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
            raise BatchError(f"level={level!r} is not one of {', '.join(LEVELS)}, which predictions can be about")
        units = functions.get("units")
        if isinstance(units, str) and units != "undirected":
            raise SettingError(f"units={units!r} is not known. Give 'undirected', or a function of the batch")
        return super().with_options(functions)

    @property
    def level(self) -> str | None:
        """What predictions are about, if the user said so."""
        return self._level

    def chosen(self, batch: Any, level: str) -> Tensor | None:
        """The indices of the nodes or links whose predictions count; None if all do."""
        given = None if self._index is None else torch.as_tensor(self._index(batch))
        return named(self.graphs(batch), level) if given is None else given

    def graphs(self, batch: Any) -> Graphs:
        """The graphs of a batch."""
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
        if not self._parameters:  # a bare HeteroConv takes arguments of any name
            return tuple(graphs.get(f"{name}_dict" if graphs.hetero else name) for name in ("x", "edge_index")), {}
        found = {name: self._argument(graphs, name) for name in self._parameters}
        missing = [name for name in self._required if found[name] is None]
        if missing and len(self._parameters) == 1:
            return (batch,), {}
        if missing:
            raise BatchError(
                f"{type(model).__name__}.forward needs {', '.join(missing)}, which the batch does not hold. Use these "
                f"names in the batch, or say how to call it: wrap(model, call=lambda model, data: model(data.x, ...))"
            )
        return (), {name: value for name, value in found.items() if value is not None}

    def _argument(self, graphs: Graphs, name: str) -> Any:
        if name == "batch_size":  # PyG's models mean the number of graphs, its loaders that of seeds
            seeds = graphs.seeds[1] if graphs.seeds is not None and name in self._required else None
            return graphs.count if graphs.graph_of() is not None and seeds is None else seeds
        own = graphs.get(name)
        if own is None and graphs.hetero:  # the argument names of a model made by to_hetero
            own = graphs.for_links(name) if name in _FOR_LINKS else graphs.get(f"{name}_dict")
        if own is not None or name not in _ALIKE:
            return own
        other = graphs.get(_ALIKE[name])
        if name == "edge_weight" and isinstance(other, Tensor) and other.dim() > 1:
            return None  # features are not weights
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
            graph_index = graphs.graph_of(relation and relation[2])
            return (
                torch.zeros(len(values[str(site)]), dtype=torch.long)
                if graphs.single or graph_index is None
                else graph_index
            )
        messages = self.messages(batch, site, values)
        if not len(messages.sent) and not graphs.connected:
            raise BatchError(
                f"site {site}: no message was sent, because the batch holds no edge that this layer uses. Leave out "
                "graphs without edges, or mask another layer"
            )
        found = messages.graph()
        if found is None:
            raise BatchError(
                f"site {site}: the nodes of the layer are not those of the batch, as after pooling, so the graph of "
                "each message is unknown. Explain one graph at a time, mask an earlier layer, or give it: "
                "wrap(model, example_index=lambda batch, site: ...)"
            )
        return found

    def edges(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Mapping[str, Int[Tensor, " row"]] | None:
        """The columns source, target, edge, and relation if there are several.

        `edge` is the edge's number in its graph, or in the graph that it was sampled from (`e_id`); -1 for messages
        along no edge of the batch, such as a self-loop that the layer added.
        """
        if self._edges is not None or not self.dependencies(site):
            return super().edges(site, batch, values)
        return self.messages(batch, site, values).columns()

    def units(self, site: Site, batch: Any, values: Mapping[str, Tensor]) -> Int[Tensor, "*positions"] | None:
        """With `units="undirected"`, one number for both directions of an edge; nodes stay separate."""
        if not isinstance(self._units, str) or self._edges is not None:
            return super().units(site, batch, values)
        return self.messages(batch, site, values).undirected if self.dependencies(site) else None

    def messages(self, batch: Any, site: Site, values: Mapping[str, Tensor]) -> Messages:
        """The messages of a site, built once per pass."""
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
        except RuntimeError:  # the batch was not made from a list
            return None
        return Batch.from_data_list([own[number] for number in numbers]) if max(numbers) < len(own) else None

    def perturb(self, batch: Any, generator: Generator) -> Any | None:
        """The same graphs with the features of their nodes, and of their edges, permuted."""
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
            y, graph_index = label.long() if classes else label, graphs.graph_of_links()
            y = y if graph_index is None else y[graph_index.argsort(stable=True)]
        else:
            y, index = graphs.get("y"), named(graphs, "node")
            if isinstance(y, Tensor) and index is not None and len(y) == graphs.nodes() != graphs.count:
                y = y[index.to(y.device)]
        fits = isinstance(y, Tensor) and y.numel() == graphs.count and not y.is_floating_point()
        return [str(label) for label in y.reshape(-1).tolist()] if fits else None


@functools.lru_cache(maxsize=1024)  # called for each site in every pass
def _beside(site: Site) -> tuple[Site, ...]:
    """The site that says which nodes a site's edges connect, if this adapter found the site."""
    parent, _, child = site.module.rpartition(".")
    ends = {"edge": "edge_ends", "edge_source": "edge_ends", "edge_target": "edge_ends"}.get(child, "edges")
    ours = (child in ("message", "source", "target") or ends != "edges") and _axis(site) == "edge"
    return (Site(join(parent, ends), call=site.call),) if ours else ()


def _axis(site: Site) -> str | None:
    """Whether a site's rows are edges, nodes, or neither."""
    first = site.pattern.positions[:1] if site.pattern is not None else ()
    return first[0] if first in (("edge",), ("node",)) else None


def _relation(graphs: Graphs, site: Site) -> Relation | None:
    """The edge type of a layer that serves one, by its name in the model; None if it serves all."""
    if not graphs.relations:
        return None
    name = _plain(f"_{site.module}_")
    found = [relation for relation in graphs.relations if _plain(f"_{'__'.join(relation)}_") in name]
    return max(found, key=lambda relation: len("_".join(relation)), default=None)


def _plain(name: str) -> str:
    """A name without PyG's separators between the parts of a type."""
    return re.sub(r"[^0-9A-Za-z]+|_+", "_", name)
