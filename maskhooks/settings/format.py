"""The format of saved runs and explanations, which each file names so that another version can refuse it."""

from __future__ import annotations

from typing import Any

from maskhooks.errors import FormatError

FORMAT = 2  # 1 was that of maskhooks 0.1.0: other names of settings and columns, nothing that ties weights to them


def check_format(path: object, found: Any) -> None:
    """Raises FormatError for a file of another format than `FORMAT`."""
    if found == FORMAT:
        return
    by = "maskhooks 0.1.0" if found == 1 else "another version of maskhooks"
    raise FormatError(
        f"{path} has format {found!r}, which {by} wrote; this version reads format {FORMAT}. Read it with the version "
        "that wrote it, or make it again with this one.",
        path=path,
    )
