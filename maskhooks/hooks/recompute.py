"""Recompute: how a tap handles activation checkpointing, which runs modules again during backward."""

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
    """Whether a backward pass is running, so that modules run again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _hooked() -> bool:
    """Whether hooks on saved tensors are active here, as inside non-reentrant checkpointing."""
    if torch.compiler.is_compiling():
        return False
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True


@dataclass
class Pass:
    """What a tap knows about the latest pass of its model.

    Attributes:
        grad: the pass began with gradients enabled.
        outer: it began under the caller's hooks on saved tensors, which look like the model's own.
        inside: a site fired where modules will be recomputed.
        around: any module ran where modules will be recomputed.
        hidden: a value was replaced while gradients were off, as in reentrant checkpointing.
        learning: the sites whose replacement requires grad while the value did not.
        put: by site, the values that will be recomputed, each with its replacement or None.
        thread: which thread may run the model; None while the tap is closed.
    """

    grad: bool = False
    outer: bool = False
    inside: bool = False
    around: bool = False
    hidden: bool = False
    learning: list[Site] = field(default_factory=list)
    put: dict[str, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)

    thread: int | None = None

    def begin(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.outer = self.grad and _hooked()
        self.inside = self.around = self.hidden = False
        self.learning.clear()
        self.put.clear()

    def recomputed(self) -> bool:
        """Whether non-reentrant checkpointing will recompute what happens here."""
        return self.grad and not self.outer and _hooked()

    def perhaps_recomputed(self) -> bool:
        """Whether either kind of checkpointing may recompute it; the reentrant one looks like `torch.no_grad()`."""
        return self.recomputed() or (self.grad and not torch.is_grad_enabled())

    def fired(self) -> None:
        """Record that a site fired here."""
        self.inside |= self.recomputed()

    @contextlib.contextmanager
    def replacing(self, site: Site, old: Tensor) -> Iterator[list[Tensor]]:
        """Open a context for computing the replacement once, with the pass's own gradients.

        Append the replacement to the list, which keeps it for the recomputation.

        Raises:
            GradientError: the replacement would get no gradient.
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
                f"checkpointing, so its replacement would get none. {_OFF.capitalize()}, or use "
                "checkpoint(..., use_reentrant=False). If you need no gradient, run the model under torch.no_grad().",
                site=site,
            )
        self.put.setdefault(str(site), []).extend((old.detach().clone(), new) for new in made)

    def leave(self, site: Site, old: Tensor) -> None:
        """Record that a value is not replaced, because it belongs to another call."""
        self.put.setdefault(str(site), []).append((old.detach().clone(), None))

    def replaced(
        self, site: Site, old: Shaped[Tensor, "*shape"], function: Callable[[Tensor], Tensor]
    ) -> Shaped[Tensor, "*shape"] | None:
        """Return the replacement of a value that is recomputed now; None if it had none.

        Reentrant checkpointing takes its gradients from the recomputation, so the function is called again.

        Raises:
            GradientError: the replacement is unknown, or comes out differently.
        """
        found = {id(new): new for kept, new in self.put.get(str(site), []) if torch.equal(kept, old)}
        if len(found) != 1:
            raise GradientError(
                f"site {site}: activation checkpointing recomputes it during backward, but its value matches "
                f"{'several calls' if found else 'no call'} in the latest pass, so its replacement is unknown. "
                f"Run backward after each pass, or {_OFF}.",
                site=site,
            )
        (new,) = found.values()
        if new is None or not self.hidden:
            return new
        if not torch.equal(new, now := function(old)):
            raise GradientError(
                f"site {site}: reentrant activation checkpointing recomputes it during backward, but then its "
                f"replacement comes out differently. Use checkpoint(..., use_reentrant=False), or {_OFF}.",
                site=site,
            )
        return now


class Watch:
    """Refuses gradients that need modules recomputed after the tap is closed.

    Modules would run without the tap's hooks and with unfrozen weights. PyTorch compares only the number and shapes
    of the results, so gradients could be silently wrong.
    """

    def __init__(self, model: nn.Module, state: Pass) -> None:
        self._model, self._state = model, state
        self.open = False

    def __call__(self, module: nn.Module, args: object) -> None:
        """Run before every module, as a global hook."""
        if not self._state.around:
            self._state.around = self._state.recomputed()

    def guard(self, outputs: Iterable[Tensor], values: Iterable[Tensor]) -> None:
        """Watch the tensors where gradients may enter: the model's outputs and the values read."""
        ends = [tensor for tensor in outputs if tensor.requires_grad]
        inside, around = self._state.inside, self._state.around
        inside |= self._state.hidden and reentrant(ends)
        if inside or around:
            for tensor in (*ends, *(value for value in values if value.requires_grad)):
                tensor.register_hook(lambda grad: self._check(inside))

    def _check(self, inside: bool) -> None:
        if not self.open and (inside or any(weight.requires_grad for weight in self._model.parameters())):
            raise GradientError(
                "backward ran after the tap was closed, but the model recomputes parts of itself during backward "
                "(activation checkpointing). Without the tap's hooks and frozen weights the gradients would be wrong. "
                f"Run backward inside the `with`, or {_OFF}."
            )


def _same(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    return tensor


def reentrant(ends: Iterable[Tensor]) -> bool:
    """Whether a graph contains reentrant checkpointing."""
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
