"""Signature: what a module's forward takes."""

from __future__ import annotations

import inspect
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn

_ANYTHING = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]

_known: WeakKeyDictionary[FunctionType, inspect.Signature] = WeakKeyDictionary()


def signature(module: nn.Module) -> inspect.Signature:
    """What a module is called with, also where a library put an object in place of its forward.

    Such an object may carry what it wraps as the class has it, `self` included, as nnsight's does. A module that hands
    whatever it is given to its `module`, as `AveragedModel` and `DistributedDataParallel` do, takes what that one does.
    """
    found, inner = _own(module), module._modules.get("module")
    kinds = [parameter.kind for parameter in found.parameters.values()]
    return signature(inner) if inner is not None and kinds == _ANYTHING else found


def _own(module: nn.Module) -> inspect.Signature:
    forward, own = module.forward, type(module).forward
    wrapped = inspect.unwrap(forward, stop=lambda function: function is own or inspect.ismethod(function))
    if isinstance(own, FunctionType) and getattr(wrapped, "__func__", None) is own:  # asked in every pass
        if own not in _known:
            _known[own] = inspect.signature(wrapped)
        return _known[own]
    return inspect.signature(own.__get__(module) if wrapped is own and forward is not own else forward)
