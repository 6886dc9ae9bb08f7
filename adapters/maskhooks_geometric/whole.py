"""Masks an edge in every layer at once, by one weight that all layers give the messages along it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskhooks.errors import ModelError
from maskhooks.hooks.port import Uncopied
from maskhooks.sites.modules import places
from maskhooks_geometric.graphs import code
from maskhooks_geometric.sent import Sent

PLACES = ("edge_ends", "edge_source", "edge_target", "edge")

_open: WeakKeyDictionary[nn.Module, Whole] = WeakKeyDictionary()


@contextlib.contextmanager
def weighing(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Whole]:
    """A context in which the edges of a model's layers pass the places of the model.

    Args:
        layers: the layers by name.
    """
    whole = _open.get(model) or Whole(model)
    whole.codes = {layer: code(name) for name, layer in layers.items()}
    with whole:
        yield whole


@contextlib.contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """A context that counts as one pass of a model, whichever parts are called, such as an encoder, then a decoder."""
    whole = _open.get(model)
    if whole is None:
        yield
        return
    whole.begin()
    whole.held = True
    try:
        yield
    finally:
        whole.held = False
        whole.end()


class Whole(Uncopied):
    """The edge weights of the current pass, while the model is open."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._users = 0
        self._known: list[tuple[Sent, Tensor]] = []  # edges and their weights
        self._handles: list[RemovableHandle] = []
        self._within = False  # whether a pass of the model is running
        self.held = False  # whether the pass continues after the model's forward
        self.codes: Mapping[nn.Module, int | None] = {}  # the edge types that layers serve

    def __enter__(self) -> None:
        self._users += 1
        if not self._handles:
            self._handles = [
                self._model.register_forward_pre_hook(self.begin),
                self._model.register_forward_hook(self.end, always_call=True),
            ]
            _open[self._model] = self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            while self._handles:
                self._handles.pop().remove()
            self.end()
            _open.pop(self._model, None)

    def begin(self, *_: object) -> None:
        """Begin a pass."""
        if not self.held:
            self._known.clear()
            self._within = True

    def end(self, *_: object) -> None:
        """End a pass."""
        if not self.held:
            self._known.clear()
            self._within = False

    @property
    def tapped(self) -> Mapping[str, nn.Module]:
        """The places with hooks."""
        stand = places(self._model)
        return {name: stand[name] for name in PLACES if name in stand and stand[name]._forward_hooks}

    def weights(
        self, edges: Sent, states: Callable[[int], Tensor | None], like: Tensor, layer: nn.Module
    ) -> Float[Tensor, "edge 1"] | None:
        """A weight for each edge, shared by all layers called with these edges; None if all weights are 1.

        Args:
            edges: the edges that the layer was called with.
            states: the states of the sending (0) or receiving (1) nodes, as the first layer with these edges gets them.
            like: a tensor with the dtype of messages.
            layer: the layer.

        Raises:
            ModelError: the layer runs outside a pass of the whole model, so it is unknown which layers share the edge.
        """
        tapped = self.tapped
        if not tapped:
            return None
        if not self._within:
            raise ModelError(
                f"a layer of {type(self._model).__name__} runs by itself, but an edge in every layer at once needs a "
                "pass of the whole model. Wrap the part that is run, or mask the messages of its layers"
            )
        edges = self._coded(edges, layer)
        for known, weights in self._known:
            if _same(known, edges):
                return weights
        if "edge_ends" in tapped:
            portion = torch.full_like(edges.source, len(self._known))
            tapped["edge_ends"](replace(edges, portion=portion).rows())
        for side, name in enumerate(("edge_source", "edge_target")):
            if name in tapped and (found := states(side)) is not None:
                tapped[name](found)
        weights = like.new_ones(len(edges), 1)
        weights = tapped["edge"](weights) if "edge" in tapped else weights
        self._known.append((edges, weights))
        return weights

    def _coded(self, edges: Sent, layer: nn.Module) -> Sent:
        """Fill in the edge type that a layer serves, since two types may hold the same pairs of numbers."""
        known = self.codes.get(layer)
        if known is None:
            return edges
        return replace(edges, relation=torch.where(edges.relation < 0, known, edges.relation))


def _same(known: Sent, own: Sent) -> bool:
    """Whether two lists hold the same edges, whatever the layers' flow; relations count only if both know them."""
    if not torch.equal(known.ends, own.ends) or not torch.equal(known.nodes, own.nodes):
        return False
    untold = bool((known.relation == -1).all()) or bool((own.relation == -1).all())
    return untold or torch.equal(known.relation, own.relation)
