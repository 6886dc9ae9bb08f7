"""The output folder of a command."""

from __future__ import annotations

from pathlib import Path

from maskhooks.errors import StorageError


def make_folder(path: Path) -> None:
    """Make the folder of --out if it is missing, before computing anything.

    Raises:
        StorageError: the folder cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".maskhooks").touch()
        (path / ".maskhooks").unlink()
    except OSError as error:
        raise StorageError(
            f"{path} is not a writable folder ({error.strerror}). Choose another --out.", path=path
        ) from error
