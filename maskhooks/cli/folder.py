"""The folder that a command writes to."""

from __future__ import annotations

from pathlib import Path

from maskhooks.errors import StorageError


def make_folder(path: Path) -> None:
    """Makes the folder of --out where it is missing, before anything is computed for it.

    Raises:
        StorageError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".maskhooks").touch()
        (path / ".maskhooks").unlink()
    except OSError as error:
        raise StorageError(
            f"{path} is no folder that can be written to ({error.strerror}). Choose another --out.", path=path
        ) from error
