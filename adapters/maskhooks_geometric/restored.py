"""Restores a model after a library has changed it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import Tensor, nn

from maskhooks.seeds import preserved_rng


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[list[str]]:
    """A context that restores the model's weights, flags, gradients, hooks and attributes, bit for bit.

    It restores the global random state too.

    Yields:
        A list that, after the `with`, names what was restored: `first.weight`, `first._explain`.
    """
    changed: list[str] = []
    held: list[tuple[str, Callable[[], bool]]] = []
    memory = _Memory()
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in memory.seen:
                memory.seen.add(id(tensor))
                held.append((f"{name}.{key}".lstrip("."), _tensor(tensor)))
        held += [(f"{name}.{key}".lstrip("."), put_back) for key, put_back in memory.attributes(module)]
    try:
        with preserved_rng(model):
            yield changed
    finally:
        changed += [name for name, put_back in reversed(held) if put_back()]


class _Memory:
    """Remembers the contents of attributes: containers and plain objects, each once."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def attributes(self, owner: Any) -> Iterator[tuple[str, Callable[[], bool]]]:
        """For each attribute of an object, functions that restore its contents and the attribute itself."""
        own = vars(owner)
        for key, value in list(own.items()):
            for put_back in self.contents(value):
                yield key, put_back
        for key in list(own):
            yield key, _attribute(own, key, own[key])
        known = set(own)
        yield "", lambda: _only(own, known)

    def contents(self, value: Any, depth: int = 4) -> Iterator[Callable[[], bool]]:
        if not depth or id(value) in self.seen or isinstance(value, (nn.Module, Tensor, type)) or callable(value):
            return
        self.seen.add(id(value))
        inside: list[Any] = []
        if isinstance(value, MutableMapping):
            inside = list(value.values())
            yield _container(value, list(value.items()), lambda items: _update(value, items))
        elif isinstance(value, (MutableSequence, MutableSet)):
            inside = list(value)
            yield _container(value, list(value), lambda items: _refill(value, items))
        elif type(value).__module__.startswith("torch_geometric") and hasattr(value, "__dict__"):
            inside = list(vars(value).values())
            own = vars(value)
            yield _container(own, list(own.items()), lambda items: _update(own, items))
        for item in inside:
            yield from self.contents(item, depth - 1)


def _tensor(tensor: Tensor) -> Callable[[], bool]:
    before, needs, grad = tensor.detach().clone(), tensor.requires_grad, tensor.grad
    slope = None if grad is None else grad.detach().clone()

    def put_back() -> bool:
        same = tensor.shape == before.shape and torch.equal(_bits(tensor), _bits(before))
        changed = not same or tensor.requires_grad != needs or tensor.grad is not grad
        with torch.no_grad():
            if not same:
                tensor.set_(before.clone())  # type: ignore[call-overload] # torch's own, of one tensor
            if slope is not None and grad is not None and not torch.equal(_bits(grad), _bits(slope)):
                changed = True
                grad.copy_(slope)
        tensor.requires_grad_(needs)
        tensor.grad = grad
        return changed

    return put_back


def _attribute(own: dict[str, Any], key: str, value: Any) -> Callable[[], bool]:
    def put_back() -> bool:
        changed = key not in own or own[key] is not value
        own[key] = value
        return changed

    return put_back


def _only(own: dict[str, Any], known: set[str]) -> bool:
    """Remove new attributes."""
    more = [key for key in own if key not in known]
    for key in more:
        del own[key]
    return bool(more)


def _container(value: Any, before: list[Any], refill: Callable[[list[Any]], Any]) -> Callable[[], bool]:
    def put_back() -> bool:
        now = list(value.items()) if isinstance(value, MutableMapping) else list(value)
        if len(now) == len(before) and all(map(_same, now, before)):
            return False
        refill(before)
        return True

    return put_back


def _update(value: MutableMapping[Any, Any], items: list[Any]) -> None:
    value.clear()
    value.update(items)


def _refill(value: Any, items: list[Any]) -> None:
    value.clear()
    (value.update if isinstance(value, MutableSet) and hasattr(value, "update") else value.extend)(items)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) and len(one) == len(other) else [(one, other)]
    return all(a is b or (isinstance(a, (str, int, float)) and type(a) is type(b) and a == b) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
