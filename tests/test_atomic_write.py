"""Atomic writes: a file is there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

import pytest

from maskhooks.atomic_write import atomic_open, clear
from maskhooks.errors import StorageError


def test_the_file_is_there_when_all_of_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_open(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def _fail(file: IO[bytes], error: type[BaseException]) -> None:
    file.write(b"half")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_where_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with pytest.raises(error), atomic_open(path) as file:
        _fail(file, error)
    assert path.read_bytes() == b"former"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"former")
    monkeypatch.setattr(os, "fsync", full)
    expected = pytest.raises(StorageError, match=r"file cannot be written \(No space left on device\).*free some space")
    with expected as caught, atomic_open(path) as file:
        file.write(b"half")
    assert caught.value.path == path
    assert path.read_bytes() == b"former"
    with pytest.raises(StorageError, match="No such file or directory"), atomic_open(tmp_path / "no" / "file"):
        pass


def test_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    (tmp_path / ".file-x7.partial").write_bytes(b"half")
    with atomic_open(other):
        clear(path)
        assert any(left.name.startswith(".other-") for left in tmp_path.iterdir())
    assert [left.name for left in tmp_path.iterdir()] == ["other"]
