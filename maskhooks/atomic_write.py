"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from maskhooks.errors import StorageError

MARK = ".partial"


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` once all of it is on disk.

    If the process is killed or fails, `path` keeps its old contents. Names of temporary files begin with a dot, so
    readers of folders skip them, and two processes never share one.

    Raises:
        StorageError: the file cannot be written, for example on a full disk; the error names `path`.
    """
    made: Path | None = None
    try:
        number, name = tempfile.mkstemp(MARK, f".{path.name}-", path.parent)
        made = Path(name)
        with open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        made.chmod(0o666 & ~_umask())
        made.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}). Its old contents are untouched: free some space "
            "or choose another folder, then resume.",
            path=path,
        ) from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Delete temporary files of `path` that killed processes left."""
    for left in path.parent.glob(f".{path.name}-*{MARK}"):
        left.unlink(missing_ok=True)


def _umask() -> int:
    """Return the permission mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Flush the folder's new entry to disk where the system allows it."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
