"""Run log: a training run's logs as CSV files, written one row at a time."""

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
    """Writes rows to `<name>.csv` in a folder and to a TensorBoard `Board`; None disables either."""

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
            with contextlib.suppress(OSError):  # `write` already reported a full disk
                file.close()
        if self.board is not None:
            self.board.close()

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row; a run's first row overwrites the file.

        Raises:
            StorageError: the file cannot be written, for example on a full disk.
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
        """Flush each file to disk and return its size in bytes.

        Raises:
            StorageError: a file cannot be written.
        """
        return {name: self._position(name, file) for name, file in self._files.items()}

    def resume(self, positions: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
        """Truncate the files to `positions` to append from there, and return the rows kept.

        Raises:
            CorruptFileError: a file is shorter than that, or missing.
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
                    f"{path} has lost rows since the run was saved. Start again without resume.",
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
        f"{path} cannot be written ({error.strerror or error}). Free some space, or use another folder.", path=path
    )


def _value(column: str, text: str) -> Any:
    """Parse a cell; Python writes numbers so that reading them gives the same bits."""
    if column == "site":
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None
