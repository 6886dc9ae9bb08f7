"""torch's recurrent modules of every kind, and inputs for them: padded, packed and without a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from maskhooks.masks.mix import mix

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


KINDS = ["tanh", "relu", "gru", "lstm", "lstm-proj"]
INPUTS = ["batch", "packed", "unsorted", "alone"]
LENGTHS = {"packed": [5, 4, 4, 1], "unsorted": [3, 5, 1, 5]}


def network(kind: str, layers: int = 1, both: bool = False, first: bool = True, **settings: Any) -> nn.RNNBase:
    settings |= {"num_layers": layers, "bidirectional": both, "batch_first": first, "dropout": 0.5 * (layers > 1)}
    if kind in ("tanh", "relu"):
        return nn.RNN(4, 6, nonlinearity=kind, **settings)
    if kind == "gru":
        return nn.GRU(4, 6, **settings)
    return nn.LSTM(4, 6, proj_size=3 if kind == "lstm-proj" else 0, **settings)


def arguments(module: nn.RNNBase, given: str, initial: bool, dtype: torch.dtype) -> tuple[Tensor, Any, Any]:
    """A leaf, the input made of it, and initial states."""
    shape = (5, 4) if given == "alone" else (4, 5, 4) if module.batch_first else (5, 4, 4)
    leaf = torch.randn(shape, dtype=dtype, requires_grad=True)
    x: Any = leaf
    if given in LENGTHS:
        ordered = given == "packed"
        x = pack_padded_sequence(leaf, torch.tensor(LENGTHS[given]), module.batch_first, enforce_sorted=ordered)
    sides = module.num_layers * (1 + module.bidirectional)
    batch = () if given == "alone" else (4,)
    h = torch.randn(sides, *batch, module.proj_size or 6, dtype=dtype)
    states: Any = (h, torch.randn(sides, *batch, 6, dtype=dtype)) if isinstance(module, nn.LSTM) else h
    return leaf, x, states if initial else None


def flat(outputs: Any) -> list[Tensor]:
    output, states = outputs
    states = states if isinstance(states, tuple) else (states,)
    return [output.data if isinstance(output, PackedSequence) else output, *states]


def assert_near(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    for one, other in zip((f.detach() for f in found), (w.detach() for w in wanted), strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= bound * max(float(other.abs().max()), 1e-3)


def open_gates(value: Tensor) -> Tensor:
    return mix(value, torch.ones(value.shape[:2])[..., None], torch.zeros(()))
