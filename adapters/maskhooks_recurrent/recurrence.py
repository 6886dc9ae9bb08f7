"""Recurrence: what a search needs of torch's recurrent modules, to share the states of common beginnings."""

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
    """Hears what a module is given, and answers in its place while there is an answer."""

    module: nn.RNNBase
    given: tuple[Any, Any] | None = None
    answer: tuple[Tensor, ...] | None = None  # h, and of an LSTM c, `layer row hidden`

    def __call__(self, input: Tensor | PackedSequence, hx: State | None = None) -> Any:
        if self.answer is None:
            self.given = input, hx
            return self.__wrapped__(input, hx)
        layout, values = Layout.of(self.module, input)
        steps, sequences = values.shape[:2]
        rows = self.answer[0].shape[1]
        last = self.answer[0][-1]
        if layout.packed is not None and sequences != rows:  # the last step alone, which takes no copy
            output: Any = PackedSequence(last, torch.tensor([rows]))
        else:
            output = layout.back(last.expand(steps, -1, -1))
        return output, self.answer if isinstance(self.module, nn.LSTM) else self.answer[0]


class Recurrent(Recurrence):
    """A module of torch.nn that goes in one direction."""

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
        heard = self._heard()
        if heard is None:
            return None
        layout, values, _ = heard
        return values[: len(values) if layout.valid is None else int(layout.valid[:, 0].sum()), 0]

    def walk(self, kept: Tensor, closed: Tensor) -> GRULayer | Layers:
        heard = self._heard()
        assert heard is not None
        self._walk = walk(self.module, kept, closed, tuple(states[:, :1] for states in heard[2]))
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

    def _heard(self) -> tuple[Layout, Tensor, tuple[Tensor, ...]] | None:
        """The layout, inputs and initial states of the last call; None for one sequence alone."""
        if self._between is None or self._between.given is None:
            return None
        given, hx = self._between.given
        layout, values = Layout.of(self.module, given)
        return None if layout.alone else (layout, values, initial(self.module, layout, values, hx))
