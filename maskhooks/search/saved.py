"""Saved: a file with the state of searches, so that a stopped search can resume."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskhooks.atomic_write import atomic_open
from maskhooks.errors import CorruptFileError, ResumeError, StorageError
from maskhooks.search.exact import Search
from maskhooks.settings.format import FORMAT, check_format


class Saved:
    """The state of some searches in a file.

    Args:
        path: the file; if it exists, the searches resume from it.
        metadata: what must match to resume, JSON-serialisable.
        searches: in order.
        every: seconds after which `later` writes.

    Raises:
        ResumeError: the file belongs to other searches.
        CorruptFileError: the file cannot be read.
        StorageError: the path is a folder.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], searches: Sequence[Search], *, every: float = 30.0
    ) -> None:
        self.path, self.metadata, self.searches, self.every = path, dict(metadata), list(searches), every
        self._written = time.monotonic()
        if path.exists():
            if path.is_dir():
                raise StorageError(f"{path} is a folder. Name a file for the state of the search.", path=path)
            self._restore()

    def now(self) -> None:
        """Write the file.

        Raises:
            StorageError: the file cannot be written; the old one is unchanged.
        """
        state = {"format": FORMAT, "metadata": self.metadata, "searches": [search.state() for search in self.searches]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(self.path) as file:
            file.write(json.dumps(state).encode())
        self._written = time.monotonic()

    def later(self) -> None:
        """Write the file if the last write was `every` seconds ago or more."""
        if time.monotonic() - self._written >= self.every:
            self.now()

    def _restore(self) -> None:
        try:
            state = json.loads(self.path.read_bytes())
            states, metadata = state["searches"], state["metadata"]
            check_format(self.path, state["format"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{self.path} is not the state of a search ({error}). Remove it to start the search again.",
                path=self.path,
            ) from error
        others = [key for key in {**metadata, **self.metadata} if metadata.get(key) != self.metadata.get(key)]
        if others:
            raise ResumeError(
                f"{self.path} belongs to another search: {', '.join(others)} differ. Give another file, or remove this "
                "one to start the search again.",
                path=self.path,
                differences=others,
            )
        for search, one in zip(self.searches, states, strict=True):
            search.restore(one)
