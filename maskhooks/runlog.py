"""The logs of a training run: CSV files, a row at a time."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from types import TracebackType
from typing import Any


class RunLog:
    """Writes rows to `<name>.csv` of a folder as they come; without a folder they are dropped."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._files = contextlib.ExitStack()
        self._writers: dict[str, csv.DictWriter[str]] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def write(self, name: str, row: dict[str, Any]) -> None:
        if self.folder is None:
            return
        if name not in self._writers:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self._files.enter_context((self.folder / f"{name}.csv").open("w", newline="", buffering=1))
            self._writers[name] = csv.DictWriter(file, list(row))
            self._writers[name].writeheader()
        self._writers[name].writerow(row)
