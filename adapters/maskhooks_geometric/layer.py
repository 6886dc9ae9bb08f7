"""The hooks that tap the messages of one message passing layer."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks.errors import BatchError, ModelError
from maskhooks.hooks.port import Uncopied, copied
from maskhooks.masks.mix import mix
from maskhooks.sites.modules import places
from maskhooks.sites.signature import signature
from maskhooks_geometric.edges import Ends, ends, found_in, rows, weighted
from maskhooks_geometric.sent import Sent
from maskhooks_geometric.whole import Whole

PLACES = ("edges", "source", "target", "message")
_WEIGHTS = {"edge_weight", "edge_attr", "edge_type"}  # arguments as which PyG passes a sparse tensor's values
_ADJACENCY = ("edge_index", "adj_t", "hyperedge_index")

_open: WeakKeyDictionary[nn.Module, _Layer] = WeakKeyDictionary()


@contextlib.contextmanager
def sending(module: nn.Module, whole: Whole | None = None) -> Iterator[None]:
    """A context in which the messages of a layer pass its places; a layer that fuses messages computes them singly.

    Args:
        whole: weights them by their edges.
    """
    layer = _open.get(module) or _Layer(module)
    with layer:
        layer.wholes += [whole] if whole is not None else []
        try:
            yield
        finally:
            layer.wholes = [other for other in layer.wholes if other is not whole]


@contextlib.contextmanager
def cached(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A context that restores the layers' caches of normalised edges."""
    held = [
        (layer, {key: value for key, value in vars(layer).items() if key.startswith("_cached")})
        for layer in layers
        if getattr(layer, "cached", True)
    ]
    try:
        yield
    finally:
        for layer, attributes in held:
            vars(layer).update(attributes)


class _Layer(Uncopied):
    """The hooks on one layer while it is open."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.wholes: list[Whole] = []
        self._users = 0
        self._handles: list[RemovableHandle] = []
        self._own: dict[str, Any] = {}
        self._given: Mapping[str, Any] = {}  # the layer's arguments, by name
        self._sent = 0  # calls of propagate in this call of the layer
        self._call: tuple[Any, Mapping[str, Any]] = (None, {})  # propagate's arguments: edges, and the rest by name

    def __enter__(self) -> None:
        self._users += 1
        if self._users > 1:
            return
        module = self._module
        _open[module] = self
        opened = {
            "fuse": False,
            "_decomposed_layers": 1,
            "_cached_x": None,  # cached states
            "_cached_h": None,
        }
        self._own = {key: vars(module)[key] for key in opened if key in vars(module)}
        vars(module).update({key: opened[key] for key in self._own})
        self._handles = [
            module.register_forward_pre_hook(self.begin, with_kwargs=True),
            module.register_forward_hook(self.end, always_call=True),
            module.register_propagate_forward_pre_hook(self.propagate),
            module.register_message_forward_hook(self.message),
        ]

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._users:
            return
        for handle in self._handles:
            handle.remove()
        vars(self._module).update(self._own)
        _open.pop(self._module, None)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._given = signature(module).bind_partial(*args, **kwargs).arguments
        except TypeError:  # the layer raises its own error
            self._given = {}
        self._sent = 0
        if not _fits(module, self._edges):
            raise ModelError(
                f"a {type(module).__name__} with cached=True holds the edges of another graph, and sends its messages "
                "along these, whatever its input. Before wrapping the model, set the layer's `cached` to False and its "
                "`_cached_edge_index` and `_cached_adj_t`, if any, to None"
            )

    def end(self, module: nn.Module, args: object, output: object) -> None:
        self._given, self._call = {}, (None, {})

    def propagate(self, module: nn.Module, inputs: tuple[Any, Any, Mapping[str, Any]]) -> None:
        edges, _, rest = inputs
        rows(edges)  # raises if the layer cannot compute separate messages
        fused = self._own.get("fuse") and weighted(edges)
        if fused and not _WEIGHTS & {*inspect.signature(self._module.message).parameters}:
            raise BatchError(
                f"the adjacency holds weights. {type(module).__name__} multiplies messages by them when it fuses "
                "messages, but not when it computes them one by one, as while they are tapped. Give an edge_index, or "
                "an adjacency of ones; a layer such as GraphConv uses weights both ways"
            )
        self._call = edges, rest

    def message(self, module: nn.Module, inputs: object, message: Any) -> Any:
        """The replaced message, or None if it is unchanged."""
        stand = {name: place for name, place in places(module).items() if name in PLACES and _read(place)}
        wholes = [whole for whole in dict.fromkeys(self.wholes) if whole.tapped]
        if not stand and not wholes:
            return None
        edges, _ = self._call
        sends, receives = ends(edges, self._module.flow)
        axis = self._axis(message, len(sends))
        number, self._sent = self._sent, self._sent + 1
        sent = self._sent_along(sends, receives, number) if wholes or "edges" in stand else None
        if "edges" in stand and sent is not None:
            stand["edges"](sent.rows())
        for name, index, side in (("source", sends, 0), ("target", receives, 1)):
            if name in stand and (states := self._states(index, side)) is not None:
                stand[name](states, index)
        before = after = _flat(message, axis)
        if "message" in stand:
            after = stand["message"](after)
        for whole in wholes:
            assert sent is not None
            after = self._weighed(after, sent, whole)
        if after is before:
            return None
        shape = [message.shape[axis], *(size for at, size in enumerate(message.shape) if at != axis)]
        return copied(after.reshape(shape).movedim(0, axis), message)

    def _weighed(self, messages: Tensor, sent: Sent, whole: Whole) -> Tensor:
        """Messages multiplied by the weights of their edges; those along no edge are unchanged."""
        given = self._edges()
        edges = sent if given is None else given

        def states(side: int) -> Tensor | None:
            index = edges.target if side else edges.source
            found = self._states(index, side)
            return None if found is None else found.index_select(0, index)

        weights = whole.weights(edges, states, messages, self._module)
        if weights is None or not len(edges):
            return messages
        edge = found_in(sent.by_relation(), edges.by_relation())
        own = torch.where(edge[:, None] < 0, 1.0, weights[edge.clamp(min=0)]).to(messages.dtype)
        return mix(messages, own, torch.zeros_like(messages[:1])) if len(messages) else messages

    def _edges(self) -> Sent | None:
        """The edges that the layer was called with; None if there were none."""
        flipped = self._module.flow != "source_to_target"
        mapping = next((v for v in self._given.values() if isinstance(v, Mapping) and _adjacencies(v)), None)
        if mapping is not None:
            parts = [(rows(adjacency), number) for number, adjacency in enumerate(mapping.values())]
        else:
            adjacency = next((self._given[key] for key in _ADJACENCY if self._given.get(key) is not None), None)
            if adjacency is None:
                return None
            types = self._given.get("edge_type", self._call[1].get("edge_type"))
            parts = [(rows(adjacency), types)]
        kinds = []
        for (first, _), relation in parts:
            if isinstance(relation, Tensor) and len(relation) == len(first):
                kinds.append(relation.to(first))
            else:
                kinds.append(torch.full_like(first, relation if isinstance(relation, int) else -1))
        first, second = (torch.cat(side) for side in zip(*(ends for ends, _ in parts), strict=True))
        return self._sent_by(*((second, first) if flipped else (first, second)), torch.cat(kinds))

    def _axis(self, message: Any, count: int) -> int:
        """The edge axis of a message tensor.

        Raises:
            ModelError: the numbers of messages and edges differ.
        """
        if isinstance(message, Tensor) and message.dim():
            axis = self._axis_of(message)
            if message.shape[axis] == count:
                return axis
        got = f"a tensor {list(message.shape)}" if isinstance(message, Tensor) else f"a {type(message).__name__}"
        raise ModelError(
            f"{type(self._module).__name__}.message returned {got} for {count} edges along axis "
            f"{self._module.node_dim}, so its messages cannot be distinguished. Return one row per edge."
        )

    def _axis_of(self, value: Tensor) -> int:
        """The node or edge axis of a tensor, which may have fewer axes than usual."""
        axis: int = self._module.node_dim
        return min(max(axis + value.dim() if axis < 0 else axis, 0), value.dim() - 1)

    def _sent_along(self, sends: Tensor, receives: Tensor, number: int) -> Sent:
        """The messages of the `number`-th call of `propagate` in this call of the layer."""
        flipped = self._module.flow != "source_to_target"
        relation = self._relations((receives, sends) if flipped else (sends, receives), number)
        if isinstance(relation, tuple):  # the layer numbers nodes across all types, the edges given do not
            relation, (sends, receives) = relation[0], relation[1][::-1] if flipped else relation[1]
        return self._sent_by(sends, receives, relation)

    def _sent_by(self, sends: Tensor, receives: Tensor, relation: Tensor) -> Sent:
        states = next(iter(self._given.values()), None)
        first = states[0] if isinstance(states, (tuple, list)) and states else states
        nodes = first.shape[self._axis_of(first)] if isinstance(first, Tensor) and first.dim() else -1
        flipped = int(self._module.flow != "source_to_target")
        return Sent(sends, receives, relation, torch.full_like(sends, flipped), torch.full_like(sends, nodes))

    def _relations(self, own: Ends, number: int) -> Any:
        """The relation of each message, -1 if it has none; if needed, a pair with the ends numbered by node type."""
        none = torch.full_like(own[0], -1)
        mapping = next((v for v in self._given.values() if isinstance(v, Mapping) and _adjacencies(v)), None)
        if mapping is not None:
            several = [rows(adjacency) for adjacency in mapping.values()]
            if sum(len(first) for first, _ in several) == len(none):
                numbers = [torch.full_like(first, index) for index, (first, _) in enumerate(several)]
                return torch.cat(numbers), tuple(torch.cat(side) for side in zip(*several, strict=True))
            same = [index for index, other in enumerate(several) if _same(own, other)]
            return none if not same else none.fill_(number if number in same else same[0])
        types = self._given.get("edge_type", self._call[1].get("edge_type"))
        edges = self._given.get("edge_index")
        if not isinstance(types, Tensor) or not isinstance(edges, Tensor):
            return none
        given = rows(edges)
        if len(types) == len(none) and _same(own, given):
            return types.to(none)
        chosen = types == number if len(types) == len(given[0]) else None
        if chosen is not None and _same(own, (given[0][chosen], given[1][chosen])):
            return none.fill_(number)
        return none

    def _states(self, index: Tensor, side: int) -> Tensor | None:
        """The states of all nodes on one side, one row each; None if the layer has none.

        They are the layer's input or, if that is not states, what the layer passes on to its messages.

        Args:
            index: the nodes that send or receive.
            side: 0 for the sending nodes.
        """
        place = side if self._module.flow == "source_to_target" else 1 - side
        given = next(iter(self._given.values()), None)
        found = self._rows_of(given, index, place)
        if found is not None or _is_states(given):
            return found
        takes = inspect.signature(self._module.message).parameters
        passed = [value for key, value in self._call[1].items() if f"{key}_i" in takes or f"{key}_j" in takes]
        parts = [part for value in passed if (part := self._rows_of(value, index, place)) is not None]
        least = min(map(len, parts), default=0)
        return torch.cat([part[:least] for part in parts], 1) if parts else None

    def _rows_of(self, states: Any, index: Tensor, place: int) -> Tensor | None:
        """A tensor of states, or one of a pair, as one row per node; None if some nodes lack a row."""
        if isinstance(states, (tuple, list)) and len(states) == 2:
            states = states[place]
        if not isinstance(states, Tensor) or not states.is_floating_point() or not states.dim():
            return None
        axis = self._axis_of(states)
        if len(index) and int(index.max()) >= states.shape[axis]:
            return None
        return _flat(states, axis)


def _read(place: nn.Module) -> bool:
    """Whether a hook reads or replaces the values of a place."""
    return bool(place._forward_hooks or place._forward_pre_hooks)


def _flat(value: Tensor, axis: int) -> Tensor:
    """Flatten a value to `edge feature`."""
    first = value.movedim(axis, 0)
    return first.reshape(len(first), math.prod(first.shape[1:]))


def _is_states(given: Any) -> bool:
    pair = given if isinstance(given, (tuple, list)) else (given,)
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in pair)


def _adjacencies(given: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds edges by type; types are triples."""
    return bool(given) and all(isinstance(key, tuple) and len(key) == 3 for key in given)


def _fits(layer: Any, edges: Callable[[], Sent | None]) -> bool:
    """Whether the edges in a layer's cache, if any, are those that it is called with."""
    for held in (getattr(layer, "_cached_edge_index", None), getattr(layer, "_cached_adj_t", None)):
        if held is not None and (given := edges()) is not None:
            return _alike(rows(held[0] if isinstance(held, tuple) else held), (given.source, given.target))
    return True


def _alike(one: Ends, other: Ends) -> bool:
    """Whether two lists hold the same edges in any order and direction, self-loops aside."""
    between = [torch.stack(ends, 1).sort(1).values[ends[0] != ends[1]] for ends in (one, other)]
    return len(between[0]) == len(between[1]) and bool((found_in(*between) >= 0).all())


def _same(one: Ends, other: Ends) -> bool:
    return len(one[0]) == len(other[0]) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
