"""Paths into nested values: read, replace one tensor, change nothing in place."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from maskhooks.sites import nested
from maskhooks.sites.nested import PathError

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Box:
    logits: torch.Tensor
    note: str = field(default="", init=False)


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class Plain:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def t(value: float = 0.0) -> torch.Tensor:
    return torch.full((2,), value)


CASES: list[tuple[str, Any, nested.Path]] = [
    ("tuple", (t(1), t(2)), (1,)),
    ("last of a tuple", (t(1), t(2)), (-1,)),
    ("list", [t(1), t(2)], (0,)),
    ("named tuple by name", Pair(t(1), t(2)), ("right",)),
    ("named tuple by position", Pair(t(1), t(2)), (1,)),
    ("dict", {"a": t(1), "b": t(2)}, ("b",)),
    ("dict by position", {"a": t(1), "b": t(2)}, (0,)),
    ("dict with numbers as keys", {1: t(1), 0: t(2)}, (0,)),
    ("ordered dict", OrderedDict(a=t(1), b=t(2)), (-1,)),
    ("user dict", UserDict(a=t(1), b=t(2)), ("a",)),
    ("dataclass", Box(t(1)), ("logits",)),
    ("frozen dataclass", Frozen(t(1)), ("logits",)),
    ("plain object", Plain(t(1)), ("logits",)),
    ("deep", (t(0), {"x": [Box(t(1)), None]}), (1, "x", 0, "logits")),
    ("torch's return type", torch.max(torch.randn(2, 2), 1), (0,)),
    ("packed sequence", pack_sequence([torch.ones(2), torch.ones(1)]), ("data",)),
]


@pytest.mark.parametrize(("value", "path"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_put_then_get(value: Any, path: nested.Path) -> None:
    old = nested.get(value, path)
    new = t(9)
    changed = nested.put(value, path, new)
    assert type(changed) is type(value)
    assert nested.get(changed, path) is new
    assert nested.get(value, path) is old
    others = [tensor for _, tensor in nested.tensors(value) if tensor is not old]
    assert all(any(tensor is kept for _, kept in nested.tensors(changed)) for tensor in others)


def test_put_keeps_what_a_dataclass_holds_besides() -> None:
    box = Box(t(1))
    box.note = "mine"
    box.extra = [1]  # type: ignore[attr-defined]
    changed = nested.put(box, ("logits",), t(2))
    assert changed.note == "mine"
    assert changed.extra is box.extra  # type: ignore[attr-defined]


def test_put_at_the_root() -> None:
    assert nested.put((t(1),), (), None) is None


def test_model_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.SequenceClassifierOutput(logits=t(1), hidden_states=(t(2), t(3)))
    for path in [("logits",), (0,), ("hidden_states", 1), (1, 0)]:
        changed = nested.put(value, path, t(9))
        assert nested.get(changed, path).tolist() == [9, 9]
        assert nested.get(value, path).tolist() != [9, 9]
    assert nested.put(value, ("logits",), t(9)).logits.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        ((t(), t()), (7,), r"no \[7\] in a tuple with tensors at \[0\] \[2\], \[1\] \[2\]"),
        ({"a": t()}, ("b",), r"no \.b in a dict with tensors at \.a \[2\]"),
        (t(), (0,), r"no \[0\] in a tensor \[2\]"),
        (({"a": None},), (0, "a", "b"), r"no \.b in None at \[0\]\.a"),
        (Box(t()), ("__class__",), r"no \.__class__"),
    ],
)
def test_path_that_leads_nowhere(value: Any, path: nested.Path, message: str) -> None:
    with pytest.raises(PathError, match=message):
        nested.get(value, path)
    with pytest.raises(PathError, match=message):
        nested.put(value, path, t())


class ReadOnly:
    @property
    def logits(self) -> torch.Tensor:
        return t(1)


@pytest.mark.parametrize(
    ("value", "path"),
    [(types.MappingProxyType({"a": t(1)}), ("a",)), (ReadOnly(), ("logits",))],
    ids=["mapping", "property"],
)
def test_read_only_containers_are_refused(value: Any, path: nested.Path) -> None:
    """Setting an attribute beside the value would change nothing, without an error."""
    with pytest.raises(TypeError, match="cannot replace"):
        nested.put(value, path, t(2))


def test_tensors_come_in_order_with_paths() -> None:
    value = (t(), [None, {"a": t(), "b": 3}], Box(t()), Pair(t(), 1))
    assert [path for path, _ in nested.tensors(value)] == [(0,), (1, 1, "a"), (2, "logits"), (3, "left")]


def test_describe() -> None:
    assert nested.describe(None) == "None"
    assert nested.describe(3) == "a int"
    assert nested.describe([t()] * 8).endswith("[5] [2], ...")


values = st.recursive(
    st.builds(lambda: t()),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
    ),
    max_leaves=8,
)


@given(values, st.data())
def test_every_tensor_can_be_exchanged(value: Any, data: st.DataObject) -> None:
    found = list(nested.tensors(value))
    path, old = data.draw(st.sampled_from(found))
    new = t(5)
    after = list(nested.tensors(nested.put(value, path, new)))
    assert [(p, new if p == path else tensor) for p, tensor in found] == after or after[0][1] is new
    assert [id(x) for _, x in after] == [id(new) if p == path else id(x) for p, x in found]
    assert nested.get(value, path) is old
