"""Frozen: put a model in eval mode with frozen weights within a `with`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock, get_ident

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from maskhooks.errors import ModelError
from maskhooks.hooks.threads import check_thread
from maskhooks.sites.modules import running


@dataclass
class _Hold:
    """A module in training mode or a weight that requires grad, switched off by `count` `with` blocks."""

    part: nn.Module | Tensor
    places: list[tuple[nn.Module, str]]  # where a weight is registered
    count: int = 0

    def switch(self, on: bool) -> None:
        if isinstance(self.part, nn.Module):
            self.part.training = on
            return
        self.part.requires_grad_(on)
        for module, name in self.places:  # if weights are moved in and out, another tensor may be there now
            now = getattr(module, name, None)
            if now is not self.part and isinstance(now, nn.Parameter):
                now.requires_grad_(on)


@dataclass
class _Open:
    """A model that `count` blocks are open on.

    Attributes:
        restores: whether weights require grad again when the last one closes, as far as its first block knows.
        thread: the thread of all blocks.
    """

    model: nn.Module
    holds: list[_Hold]
    restores: bool
    thread: int
    count: int = 0

    def close(self) -> None:
        with _lock:
            self.count -= 1
            if not self.count:
                del _open[id(self.model)]
                _release(self.holds)


_lock = Lock()
_holds: dict[int, _Hold] = {}
_open: dict[int, _Open] = {}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[bool]:
    """Put a model in eval mode with frozen weights; flags are set directly and restored one by one.

    Several blocks may be open on one model or its parts, and close in any order: the last one restores a part. A
    further block on the same model takes no time.

    Yields:
        Whether weights require grad again afterwards, as far as this block knows.

    Raises:
        ModelError: a weight has no shape yet.
        TappedModelError: another thread has a block open on the model.
    """
    with _lock:
        block = _open.get(id(model))
        first = block is None
        if block is None:
            block = _open[id(model)] = _hold(model)
        check_thread(block.thread)
        block.count += 1
    try:
        yield first and block.restores
    finally:
        block.close()


def _hold(model: nn.Module) -> _Open:
    mine: list[_Hold] = []
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    modules, weights = running(model), dict[int, Tensor]()
    for module in modules:
        for name, weight in module._parameters.items():
            if weight is not None:
                if is_lazy(weight):
                    raise _shapeless(model)
                weights[id(weight)] = weight
                places.setdefault(id(weight), []).append((module, name))
    parts: list[nn.Module | Tensor] = [*modules, *weights.values()]
    try:
        for part in parts:
            hold = _holds.get(id(part))
            if hold is None and (part.training if isinstance(part, nn.Module) else part.requires_grad):
                hold = _holds[id(part)] = _Hold(part, places.get(id(part), []))
                hold.switch(False)
            if hold is not None:
                hold.count += 1
                mine.append(hold)
    except BaseException:
        _release(mine)
        raise
    restores = any(hold.count == 1 and isinstance(hold.part, Tensor) for hold in mine)
    return _Open(model, mine, restores, get_ident())


def _release(holds: list[_Hold]) -> None:
    for hold in holds:
        hold.count -= 1
        if not hold.count:
            del _holds[id(hold.part)]
            hold.switch(True)


def _shapeless(model: nn.Module) -> ModelError:
    lazy = [name for name, weight in model.named_parameters() if is_lazy(weight)]
    return ModelError(
        f"{len(lazy)} of the model's weights, such as {lazy[0]!r}, take their shape from the first batch. "
        "Run the model once first: with torch.no_grad(): model(...)",
        module=lazy[0].rpartition(".")[0],
    )
