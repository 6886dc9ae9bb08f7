"""Signature: what a module's forward takes."""

from __future__ import annotations

import inspect

from torch import nn


def signature(module: nn.Module) -> inspect.Signature:
    """What a module is called with, also where a library put an object in place of its forward.

    Such an object may carry what it wraps as the class has it, `self` included, as nnsight's does.
    """
    forward, own = module.forward, type(module).forward
    wrapped = inspect.unwrap(forward, stop=lambda function: function is own or inspect.ismethod(function))
    return inspect.signature(own.__get__(module) if wrapped is own and forward is not own else forward)
