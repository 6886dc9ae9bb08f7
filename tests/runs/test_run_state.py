"""States in files: exact, whole, and never read where they are broken."""

from __future__ import annotations

import errno
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from maskhooks import atomic_write
from maskhooks.errors import CorruptFileError, FormatError, ResumeWarning, StorageError
from maskhooks.runs.run_state import decode, delete_states, encode, has_state, load_state, save_state
from tests.conftest import same_bits


def tree() -> dict[str, Any]:
    return {
        "weights": [torch.randn(3, 4), torch.tensor(2.0), torch.zeros(0), torch.randn(4, 3).T],
        "others": {"half": torch.randn(2).bfloat16(), "flags": torch.tensor([True, False]), "none": None},
        "numbers": [1, 0.1 + 0.2, math.inf, -0.0, True, "tensor:output"],
    }


def test_what_is_written_is_read() -> None:
    wanted = tree()
    found = decode(encode(wanted))
    for one, other in zip(found["weights"], wanted["weights"], strict=True):
        assert same_bits(one, other)
    assert same_bits(found["others"]["half"], wanted["others"]["half"])
    assert found["others"]["flags"].tolist() == [True, False]
    assert found["others"]["none"] is None
    assert found["numbers"] == wanted["numbers"]
    assert math.copysign(1, found["numbers"][3]) == -1


def test_weights_that_share_memory() -> None:
    weight = torch.randn(4)
    found = decode(encode([weight, weight, weight[1:]]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], weight[1:])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert not has_state(tmp_path)
    for step in (1, 5, 20):
        save_state(tmp_path, step, {"step": step})
    assert load_state(tmp_path) == {"step": 20}
    assert len(list(tmp_path.iterdir())) == 2
    delete_states(tmp_path)
    assert not has_state(tmp_path)


BREAKS = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one bit of a weight": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "one letter of the settings": lambda data: data.replace(b"beta", b"bata"),
    "zeros": lambda data: bytes(len(data)),
    "a pickle": lambda data: pickle.dumps({"step": 3}),
    "another safetensors file": lambda data: b"\x02\0\0\0\0\0\0\0{}",
    "text": lambda data: b"step 3 of 5, and on it goes",
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_state_is_passed_over(tmp_path: Path, name: str) -> None:
    save_state(tmp_path, 1, {"step": 1, "weight": torch.randn(5)})
    path = save_state(tmp_path, 2, {"step": 2, "beta": 0.5, "weight": torch.randn(5)})
    path.write_bytes(BREAKS[name](path.read_bytes()))
    with pytest.warns(ResumeWarning, match=r"step-000000002.*Resuming from step-000000001"):
        assert load_state(tmp_path)["step"] == 1
    (tmp_path / "step-000000001.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"every saved state.*never read.*without resume"):
        load_state(tmp_path)


def test_every_flipped_byte_is_noticed() -> None:
    data = encode({"weight": torch.arange(3.0), "rate": 0.1})
    for place in range(len(data)):
        broken = data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :]
        with pytest.raises(ValueError):
            decode(broken)


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskhooks.runs.run_state.FORMAT", 99)
    data = encode({})
    monkeypatch.undo()
    with pytest.raises(FormatError, match="the state of the run has format 99"):
        decode(data)


def test_a_full_disk_leaves_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1, {"step": 1})

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save_state(tmp_path, 2, {"step": 2})
    assert load_state(tmp_path) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1
