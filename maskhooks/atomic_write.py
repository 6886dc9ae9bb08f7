"""Atomic writes: a file is there whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from maskhooks.errors import StorageError

MARK = ".draft"


@contextlib.contextmanager
def draft(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` once all of it is on the disk.

    Killed or failing on the way, it leaves at `path` what was there before. Names of drafts begin with a dot, so
    readers of folders pass over them, and two processes never share one.

    Raises:
        StorageError: it cannot be written, such as on a full disk; the error names `path`.
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
            f"{path} cannot be written ({error.strerror or error}). What was there before is untouched: make "
            "room, or choose another place, and go on.",
            path=path,
        ) from error
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Removes what killed processes left of drafts of `path`."""
    for left in path.parent.glob(f".{path.name}-*{MARK}"):
        left.unlink(missing_ok=True)


def _umask() -> int:
    """The mask of permissions; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Makes the folder's new entry last through a power cut, where a folder can be told to."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
