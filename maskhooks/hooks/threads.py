"""Threads: a model is explained by one thread at a time."""

from __future__ import annotations

import threading
from threading import get_ident

import torch

from maskhooks.errors import TappedModelError


def is_other(thread: int | None) -> bool:
    """Whether this is another thread; False for None, and while `torch.compile` traces."""
    return thread is not None and not torch.compiler.is_compiling() and thread != get_ident()


def check_thread(thread: int | None) -> None:
    """Refuse a pass in another thread than the one that taps or freezes the model; None if none does.

    Raises:
        TappedModelError: this is another thread.
    """
    if is_other(thread):
        names = {one.ident: one.name for one in threading.enumerate()}
        raise TappedModelError(
            f"another thread, {names.get(thread, thread)}, taps this model, so values would be mixed up. Give each "
            "thread a model of its own, as with copy.deepcopy(model), or let them take turns with a threading.Lock"
        )
