"""Converts a module's input to `token batch feature`, and its output back to the layout of the fused call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from maskhooks.errors import BatchError

State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one call lays out its sequences.

    Attributes:
        packed: the input, if it is a PackedSequence.
        alone: whether it is one sequence without a batch axis.
        batch_first: whether a tensor has the batch axis first.
        valid: bool, `token batch 1`; None if all tokens are valid.
    """

    packed: PackedSequence | None
    alone: bool
    batch_first: bool
    valid: Tensor | None

    @classmethod
    def of(cls, module: nn.RNNBase, given: Tensor | PackedSequence) -> tuple[Layout, Tensor]:
        """Return the layout of a call, and its inputs as `token batch feature`.

        Raises:
            BatchError: a sequence is empty.
        """
        if isinstance(given, PackedSequence):
            values, lengths = pad_packed_sequence(given)
            valid = torch.arange(len(values))[:, None] < lengths
            if not bool(valid.any(0).all()):
                raise BatchError("a sequence in the batch is empty and has no state. Leave it out")
            full = bool(valid.all())
            return cls(given, False, False, None if full else valid[..., None].to(values.device)), values
        alone = given.dim() == 2
        batched = given.unsqueeze(int(not module.batch_first)) if alone else given
        values = batched.transpose(0, 1) if module.batch_first else batched
        if values.dim() == 3 and not len(values):
            raise BatchError("the sequences in the batch are empty and have no state. Leave them out")
        return cls(None, alone, module.batch_first, None), values

    def back(self, values: Tensor) -> Tensor | PackedSequence:
        """Lay out `token batch feature` like the input."""
        if self.packed is not None:
            _, sizes, order, places = self.packed
            ordered = values if order is None else values.index_select(1, order)
            there = torch.arange(values.shape[1]) < sizes[:, None]
            return PackedSequence(ordered[there.to(values.device)], sizes, order, places)
        laid = values.transpose(0, 1) if self.batch_first else values
        return laid.squeeze(int(not self.batch_first)) if self.alone else laid

    def checked(self, module: nn.RNNBase, values: Tensor, states: Any) -> None:
        """Raise what the fused call raises."""
        if self.packed is not None:
            module.check_forward_args(self.packed.data, states, self.packed.batch_sizes)
        else:
            module.check_forward_args(values.transpose(0, 1) if self.batch_first else values, states, None)

    def last(self, states: Tensor) -> Tensor:
        """Lay out last states, `layer batch hidden`, like the input."""
        return states.squeeze(1) if self.alone else states

    def first(self, states: Tensor) -> Tensor:
        """Initial states as `layer batch hidden`."""
        return states.unsqueeze(1) if self.alone else states


@contextlib.contextmanager
def empty_named() -> Iterator[None]:
    """Turn the error of `pack_padded_sequence` at an empty sequence, outside any recurrent module, into ours.

    Raises:
        BatchError: a sequence is empty.
    """
    try:
        yield
    except RuntimeError as error:
        if "Length of all samples has to be greater than 0" not in str(error):
            raise
        raise BatchError("a sequence in the batch is empty and cannot be packed. Leave it out") from error
