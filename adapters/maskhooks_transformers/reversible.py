"""Runs reversible layers, which keep no states and no graph, like ordinary ones while a model is tapped.

Reformer runs its layers inside its own autograd function. The backward pass recomputes their states, in training mode
only, and without the replacements of a tap.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.autograd import Function

_open: Counter[type[Function]] = Counter()
_lock = threading.Lock()


class _Torch(ModuleType):
    """torch for one file, with a `no_grad` that does nothing."""

    no_grad = contextlib.nullcontext

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def functions(nodes: Iterable[Any]) -> set[type[Function]]:
    """The autograd functions in a graph that transformers defines."""
    found: set[type[Function]] = {node._forward_cls for node in nodes if hasattr(node, "_forward_cls")}
    return {one for one in found if one.__module__.startswith("transformers.")}


@contextlib.contextmanager
def opened(wanted: Iterable[type[Function]]) -> Iterator[None]:
    """A context in which autograd functions, and the file that defines each, compute as written, with a graph.

    It affects other models of the same class too: the same numbers, with more memory.
    """
    mine = list(wanted)
    with _lock:
        for function in mine:
            _open[function] += 1
            function.apply = _plain(function)  # type: ignore[method-assign] # until the last context ends
            sys.modules[function.__module__].torch = _Torch("torch")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with _lock:
            for function in mine:
                _open[function] -= 1
                if not _open[function]:
                    del function.apply, _open[function]
                    sys.modules[function.__module__].torch = torch  # type: ignore[attr-defined]


def _plain(function: type[Function]) -> Any:
    def apply(*args: Any) -> Any:
        return function.forward(SimpleNamespace(save_for_backward=lambda *tensors: None), *args)

    return staticmethod(apply)
