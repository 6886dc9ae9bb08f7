"""The format number of saved runs and explanations, which lets another version refuse a file."""

from __future__ import annotations

from typing import Any

from maskhooks.errors import FormatError

FORMAT = 2  # 1, of maskhooks 0.1.0, had other names of settings and columns, and no digest of the weights


def check_format(path: object, found: Any) -> None:
    """Raise FormatError for a file of a format other than `FORMAT`."""
    if found == FORMAT:
        return
    by = "maskhooks 0.1.0" if found == 1 else "another version of maskhooks"
    raise FormatError(
        f"{path} has format {found!r}, which {by} wrote; this version reads format {FORMAT}. Read it with the version "
        "that wrote it, or make it again with this one.",
        path=path,
    )
