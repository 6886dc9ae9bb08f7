"""Lets a search share the states of common prefixes in torch's recurrent modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from maskhooks.hooks.recurrence import Recurrence
from maskhooks.hooks.replay import ForwardPatch, patch_forward
from maskhooks_recurrent.forward import initial
from maskhooks_recurrent.layout import Layout, State
from maskhooks_recurrent.walk import GRULayer, Layers, walk


class Between(ForwardPatch):
    """Records a module's input, and returns `answer` in its place once there is one."""

    module: nn.RNNBase
    given: tuple[Any, Any] | None = None
    answer: tuple[Tensor, ...] | None = None  # h, and c for an LSTM, `layer row hidden`

    def __call__(self, input: Tensor | PackedSequence, hx: State | None = None) -> Any:
        if self.answer is None:
            self.given = input, hx
            return self.__wrapped__(input, hx)
        layout, values = Layout.of(self.module, input)
        steps, sequences = values.shape[:2]
        rows = self.answer[0].shape[1]
        last = self.answer[0][-1]
        if layout.packed is not None and sequences != rows:  # the last step alone, without a copy
            output: Any = PackedSequence(last, torch.tensor([rows]))
        else:
            output = layout.back(last.expand(steps, -1, -1))
        return output, self.answer if isinstance(self.module, nn.LSTM) else self.answer[0]


class Recurrent(Recurrence):
    """A unidirectional recurrent module of torch.nn."""

    def __init__(self, module: nn.RNNBase) -> None:
        self.module = module
        self._between: Between | None = None
        self._walk: GRULayer | Layers | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        with patch_forward(self.module, Between):
            self._between = self.module.__dict__["forward"]
            try:
                yield
            finally:
                self._between = None

    def inputs(self) -> Tensor | None:
        call = self._last_call()
        if call is None:
            return None
        layout, values, _ = call
        return values[: len(values) if layout.valid is None else int(layout.valid[:, 0].sum()), 0]

    def walk(self, kept: Tensor, closed: Tensor) -> GRULayer | Layers:
        call = self._last_call()
        assert call is not None
        self._walk = walk(self.module, kept, closed, tuple(states[:, :1] for states in call[2]))
        return self._walk

    @contextlib.contextmanager
    def answering(self, states: Tensor) -> Iterator[None]:
        assert self._between is not None
        assert self._walk is not None
        self._between.answer = self._walk.parts(states)
        try:
            yield
        finally:
            self._between.answer = None

    def _last_call(self) -> tuple[Layout, Tensor, tuple[Tensor, ...]] | None:
        """The layout, inputs and initial states of the last call; None for an unbatched sequence."""
        if self._between is None or self._between.given is None:
            return None
        given, hx = self._between.given
        layout, values = Layout.of(self.module, given)
        return None if layout.alone else (layout, values, initial(self.module, layout, values, hx))
