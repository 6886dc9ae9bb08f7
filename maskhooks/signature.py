"""Signature: what a module's forward takes."""

from __future__ import annotations

import inspect
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn

_known: WeakKeyDictionary[FunctionType, inspect.Signature] = WeakKeyDictionary()


def signature(module: nn.Module) -> inspect.Signature:
    """What a module is called with, also where a library put an object in place of its forward.

    Such an object may carry what it wraps as the class has it, `self` included, as nnsight's does.
    """
    forward, own = module.forward, type(module).forward
    wrapped = inspect.unwrap(forward, stop=lambda function: function is own or inspect.ismethod(function))
    if isinstance(own, FunctionType) and getattr(wrapped, "__func__", None) is own:  # asked in every pass
        if own not in _known:
            _known[own] = inspect.signature(wrapped)
        return _known[own]
    return inspect.signature(own.__get__(module) if wrapped is own and forward is not own else forward)
