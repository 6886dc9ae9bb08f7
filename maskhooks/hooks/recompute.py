"""Recompute: activation checkpointing runs modules once more during backward; what a tap does then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from maskhooks.errors import GradientError
from maskhooks.sites.site import Site

_OFF = "switch checkpointing off, for example with model.gradient_checkpointing_disable()"


def recomputing() -> bool:
    """Whether modules run within a backward pass, hence once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _hooked() -> bool:
    """Whether tensors saved for backward go through hooks here, as inside checkpointing that is not reentrant."""
    if torch.compiler.is_compiling():
        return False
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


@dataclass
class Pass:
    """What a tap knows of the latest pass of its model.

    Attributes:
        grad: it began with gradients.
        outer: it began under hooks of the caller's on saved tensors, from which the model's own cannot be told.
        inside: a site fired where modules will be computed again.
        around: any module ran where modules will be computed again.
        hidden: a value was replaced where gradients are off, as in reentrant checkpointing.
        learning: the sites where what was put in place requires grad, and the value did not.
        put: by site, the values that are computed again, and what was put in their place; None: nothing.
    """

    grad: bool = False
    outer: bool = False
    inside: bool = False
    around: bool = False
    hidden: bool = False
    learning: list[Site] = field(default_factory=list)
    put: dict[str, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)

    def begin(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.outer = self.grad and _hooked()
        self.inside = self.around = self.hidden = False
        self.learning.clear()
        self.put.clear()

    def recomputed(self) -> bool:
        """Whether what happens here will be computed again by checkpointing that is not reentrant."""
        return self.grad and not self.outer and _hooked()

    def perhaps_recomputed(self) -> bool:
        """The same for checkpointing of both kinds; the reentrant one cannot be told from `torch.no_grad()`."""
        return self.recomputed() or (self.grad and not torch.is_grad_enabled())

    def fired(self) -> None:
        """Notes that a site fired here."""
        self.inside |= self.recomputed()

    @contextlib.contextmanager
    def replacing(self, site: Site, old: Tensor) -> Iterator[list[Tensor]]:
        """A context to make the replacement in: with the pass's own gradients, and computed once only.

        Put the replacement into the list; it is kept for when its place is computed again.

        Raises:
            GradientError: no gradient would come back to it.
        """
        if not self.perhaps_recomputed():
            yield []
            return
        self.fired()
        self.hidden |= not torch.is_grad_enabled()
        made: list[Tensor] = []
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            yield made
        if any(new.requires_grad for new in made) and not torch.is_grad_enabled():
            raise GradientError(
                f"site {site}: its module runs without gradients, within torch.no_grad() or reentrant activation "
                f"checkpointing, so none would come back to what is put in its place. {_OFF.capitalize()}, or use "
                "checkpoint(..., use_reentrant=False). Run the model under torch.no_grad() where no gradient is "
                "wanted.",
                site=site,
            )
        self.put.setdefault(str(site), []).extend((old.detach().clone(), new) for new in made)

    def leave(self, site: Site, old: Tensor) -> None:
        """Notes that a value stays as it is, which is another call's than the one replaced."""
        self.put.setdefault(str(site), []).append((old.detach().clone(), None))

    def replaced(
        self, site: Site, old: Shaped[Tensor, "*shape"], function: Callable[[Tensor], Tensor]
    ) -> Shaped[Tensor, "*shape"] | None:
        """What was put in place of a value that is now computed again; None where nothing was.

        Reentrant checkpointing takes its gradients from what is computed now, so the function is called again.

        Raises:
            GradientError: it cannot be told.
        """
        found = {id(new): new for kept, new in self.put.get(str(site), []) if torch.equal(kept, old)}
        if len(found) != 1:
            raise GradientError(
                f"site {site}: activation checkpointing computes it again during backward, and its value is that of "
                f"{'several calls' if found else 'no call'} in the latest pass, so what was put in its place cannot "
                f"be told. Run backward after each pass, or {_OFF}.",
                site=site,
            )
        (new,) = found.values()
        if new is None or not self.hidden:
            return new
        if not torch.equal(new, now := function(old)):
            raise GradientError(
                f"site {site}: reentrant activation checkpointing computes it again during backward, and what is put "
                f"in its place comes out differently then. Use checkpoint(..., use_reentrant=False), or {_OFF}.",
                site=site,
            )
        return now


class Watch:
    """Refuses gradients that would be computed by computing modules again after a tap is closed.

    There they would run without the tap's hooks, and with weights that are frozen no longer. PyTorch compares only
    number and shapes of what comes out, so that gradients could be wrong without a word.
    """

    def __init__(self, model: nn.Module, state: Pass) -> None:
        self._model, self._state = model, state
        self.open = False

    def __call__(self, module: nn.Module, args: object) -> None:
        """A hook before every module."""
        if not self._state.around:
            self._state.around = self._state.recomputed()

    def guard(self, outputs: Iterable[Tensor], values: Iterable[Tensor]) -> None:
        """Watches the tensors that gradients may come in at: the model's outputs, and values that were read."""
        ends = [tensor for tensor in outputs if tensor.requires_grad]
        inside, around = self._state.inside, self._state.around
        inside |= self._state.hidden and reentrant(ends)
        if inside or around:
            for tensor in (*ends, *(value for value in values if value.requires_grad)):
                tensor.register_hook(lambda grad: self._check(inside))

    def _check(self, inside: bool) -> None:
        if not self.open and (inside or any(weight.requires_grad for weight in self._model.parameters())):
            raise GradientError(
                "backward came after the tap was closed, and the model computes parts of itself again during backward "
                "(activation checkpointing): without the tap's hooks and its frozen weights the gradients would be "
                f"wrong. Run backward inside the `with`, or {_OFF}."
            )


def _same(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    return tensor


def reentrant(ends: Iterable[Tensor]) -> bool:
    """Whether a graph holds reentrant checkpointing."""
    found, nodes = set(), [tensor.grad_fn for tensor in ends]
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        if "CheckpointFunction" in node.name():
            return True
        found.add(node)
        nodes += [other for other, _ in node.next_functions]
    return False
