"""The logs of a training run: CSV files, a row at a time."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from maskhooks.errors import CorruptFileError, StorageError
from maskhooks.runs.tensorboard import Board


class RunLog:
    """Writes rows to `<name>.csv` of a folder, and to a board, as they come; to neither where they are None."""

    def __init__(self, folder: Path | None, board: Board | None = None) -> None:
        self.folder, self.board = folder, board
        self._files: dict[str, TextIO] = {}
        self._writers: dict[str, csv.DictWriter[str]] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk was reported by the row that met it
                file.close()
        if self.board is not None:
            self.board.close()

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Adds a row; the first one of a run begins the file anew.

        Raises:
            StorageError: it cannot be written, as on a full disk.
        """
        if self.board is not None:
            self.board.write(name, row)
        if self.folder is None:
            return
        try:
            if name not in self._files:
                self._open(name, list(row), "w").writeheader()
            self._writers[name].writerow(row)
        except OSError as error:
            raise _unwritable(self.folder / f"{name}.csv", error) from error

    def positions(self) -> dict[str, int]:
        """Where each file ends now, once all of it is on the disk.

        Raises:
            StorageError: it cannot be written.
        """
        return {name: self._position(name, file) for name, file in self._files.items()}

    def go_on(self, positions: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
        """Cuts the files off where `positions` says, to write on from there; gives the rows before.

        Raises:
            CorruptFileError: a file is shorter, or gone.
        """
        found = {}
        for name, end in positions.items():
            assert self.folder is not None
            path = self.folder / f"{name}.csv"
            try:
                data = path.read_bytes()
            except OSError:
                data = b""
            if len(data) < end:
                raise CorruptFileError(
                    f"{path} has lost rows that were there when the run was saved. Begin again, without resume.",
                    path=path,
                )
            rows = csv.DictReader(io.StringIO(data[:end].decode(), newline=""))
            found[name] = [{key: _value(key, text) for key, text in row.items()} for row in rows]
            os.truncate(path, end)
            self._open(name, list(rows.fieldnames or ()), "a")
        return found

    def _position(self, name: str, file: TextIO) -> int:
        try:
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
        except OSError as error:
            assert self.folder is not None
            raise _unwritable(self.folder / f"{name}.csv", error) from error

    def _open(self, name: str, columns: list[str], mode: str) -> csv.DictWriter[str]:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        file: TextIO = (self.folder / f"{name}.csv").open(mode, newline="", buffering=1)  # type: ignore[assignment]
        self._files[name] = file
        self._writers[name] = csv.DictWriter(file, columns)
        return self._writers[name]


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}). Make room, or use another folder.", path=path
    )


def _value(column: str, text: str) -> Any:
    """A cell as it was written: Python writes a number so that reading it gives the same bits."""
    if column == "site":
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None
