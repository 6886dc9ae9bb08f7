"""Preserved: restore a model's buffers and the global random state at the end of a `with`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskhooks.seeds import preserved_rng
from maskhooks.sites.modules import running


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a model, bit for bit, and the global random state, also after an exception.

    A buffer that the model replaced by another tensor comes back if it belongs to the state dict. Others are caches,
    such as the frequencies of rotary embeddings for longer texts, which the model knows by other attributes: they stay.
    """
    with preserved_rng(model):
        buffers = _buffers(model)
        try:
            yield
        finally:
            for one in buffers:
                one.restore()


@dataclass(frozen=True)
class _Kept:
    """A buffer and a copy of its values.

    Attributes:
        module: where it is registered; None for a scripted module, whose buffers are other objects at each access.
    """

    module: nn.Module | None
    name: str
    buffer: Tensor
    values: Tensor

    def restore(self) -> None:
        if self.module is not None and self.module._buffers.get(self.name) is not self.buffer:
            if self.name in self.module._non_persistent_buffers_set:
                return
            self.module._buffers[self.name] = self.buffer
        if not _equal(self.buffer, self.values):
            with torch.inference_mode(self.buffer.is_inference()), torch.no_grad():
                if self.buffer.shape == self.values.shape:
                    self.buffer.copy_(self.values)
                else:
                    self.buffer.data = self.values


def _buffers(model: nn.Module) -> list[_Kept]:
    with torch.inference_mode(False):
        return [
            _Kept(None if isinstance(module, torch.jit.ScriptModule) else module, name, buffer, buffer.detach().clone())
            for module in running(model)
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta
        ]


def _equal(buffer: Tensor, values: Tensor) -> bool:
    """Whether values are equal; copying NaN back is right too."""
    return buffer.layout is torch.strided and torch.equal(buffer, values)
