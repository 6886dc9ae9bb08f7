"""Signature: the parameters of a module's forward."""

from __future__ import annotations

import inspect
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn

_ANYTHING = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]

_known: WeakKeyDictionary[FunctionType, inspect.Signature] = WeakKeyDictionary()


def signature(module: nn.Module) -> inspect.Signature:
    """Return the parameters of a module's call, even if a library replaced its forward by an object.

    Such an object may wrap the function of the class, `self` included, as nnsight's does. A module that passes all its
    arguments to its `module`, such as `AveragedModel` or `DistributedDataParallel`, takes that module's parameters.
    """
    found, inner = _own(module), module._modules.get("module")
    kinds = [parameter.kind for parameter in found.parameters.values()]
    return signature(inner) if inner is not None and kinds == _ANYTHING else found


def _own(module: nn.Module) -> inspect.Signature:
    forward, own = module.forward, type(module).forward
    wrapped = inspect.unwrap(forward, stop=lambda function: function is own or inspect.ismethod(function))
    if isinstance(own, FunctionType) and getattr(wrapped, "__func__", None) is own:  # called in every pass
        if own not in _known:
            _known[own] = inspect.signature(wrapped)
        return _known[own]
    return inspect.signature(own.__get__(module) if wrapped is own and forward is not own else forward)
