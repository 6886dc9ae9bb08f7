"""Shards: an explanation of any number of examples, in a folder of Parquet files read one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskhooks.atomic_write import atomic_open, clear
from maskhooks.errors import CorruptFileError, ResumeError, StorageError
from maskhooks.explanations import row_files as rowfiles
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.layers import Layers
from maskhooks.settings.format import FORMAT, check_format

MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names that begin with _
_ROWS = "explanation.parquet"  # in the folder that `maskhooks explain` writes
_NAME = re.compile(r"part-(\d{6,})\.parquet")


class Shards:
    """A folder of Parquet files with consecutive examples.

    Files are written whole or not at all. `_manifest.json` says what made them. Iteration yields an `Explanation` for
    each file, so only one is in memory at a time; `Explanation.from_parquet(folder)` reads all.

    Args:
        folder: the folder that `Explainer.explain_to` wrote, or the --out folder of `maskhooks explain`.

    Raises:
        CorruptFileError: the folder has no manifest, or it is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists() and (self.folder / _ROWS / MANIFEST).exists():
            self.folder = self.folder / _ROWS
        self.settings: dict[str, Any]
        self.totals: dict[str, int] | None
        self.settings, self.totals = _manifest(self.folder / MANIFEST)

    @classmethod
    def open(cls, folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Shards:
        """Open a folder for writing: create it, or resume one that was started with the same settings.

        Args:
            settings: what makes the rows (explainer, data, batches); JSON-serialisable.
            overwrite: remove existing rows.

        Raises:
            ResumeError: the existing rows were made with other settings; the error lists the differences.
            StorageError: the folder cannot be written to.
        """
        folder = Path(folder)
        if overwrite:
            remove(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be created ({error.strerror}). Choose another folder, or overwrite what is there.",
                path=folder,
            ) from error
        if not (folder / MANIFEST).exists():
            if any(_NAME.fullmatch(path.name) for path in folder.iterdir()):
                raise ResumeError(f"{folder} holds rows of unknown origin. {_WAY_OUT}")
            _write(folder / MANIFEST, {"format": FORMAT, "settings": settings, "totals": None})
        found = cls(folder)
        unlike = differences(found.settings, json.loads(json.dumps(settings)))
        if unlike:
            raise ResumeError(
                f"{folder} was started with other settings: {'; '.join(unlike[:5])}"
                + (f"; and {len(unlike) - 5} more" if len(unlike) > 5 else "")
                + f". Resume with the same settings. {_WAY_OUT}",
                differences=unlike,
            )
        return found

    def __repr__(self) -> str:
        state = "complete" if self.complete else "not complete"
        return f"Shards({str(self.folder)!r}, {len(self)} files, {state})"

    def __len__(self) -> int:
        return len(self.existing())

    def __iter__(self) -> Iterator[Explanation]:
        for number in sorted(self.existing()):
            yield Explanation.from_parquet(self.path(number))

    @property
    def complete(self) -> bool:
        """Whether the data ended and every file exists."""
        return self.totals is not None and self.existing() >= set(range(self.totals["files"]))

    @property
    def examples(self) -> int:
        """The number of examples in the files."""
        return (
            self.totals["examples"] if self.complete and self.totals else sum(map(self.num_examples, self.existing()))
        )

    def path(self, number: int) -> Path:
        """The file with this number."""
        return self.folder / f"part-{number:06d}.parquet"

    def existing(self) -> set[int]:
        """The numbers of the files that exist."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(name[1]) for name in names if name is not None}

    def num_examples(self, number: int) -> int:
        """Return the number of examples in a file."""
        first, last = rowfiles.span(self.path(number))
        return last - first + 1

    def write(self, number: int, explanation: Explanation) -> None:
        """Write a file, whole or not at all.

        Raises:
            StorageError: the file cannot be written, for example on a full disk.
        """
        try:
            explanation.to_parquet(self.path(number))
        except StorageError as error:
            raise StorageError(
                f"{error} Complete files stay (files: {len(self)}), and the same call resumes after them.",
                path=error.path,
            ) from error
        clear(self.path(number))

    def finish(self, files: int, examples: int) -> None:
        """Record that the data ended."""
        self.totals = {"files": files, "examples": examples}
        _write(self.folder / MANIFEST, {"format": FORMAT, "settings": self.settings, "totals": self.totals})

    def mean_kept(self) -> dict[tuple[str, int], float]:
        """`Explanation.mean_kept` over all files, with one in memory at a time."""
        totals: dict[tuple[str, int], Any] = {}
        for explanation in self:
            valid, layers = explanation["valid"], Layers(explanation.columns, explanation.sites)
            which, scores = layers.which[valid], explanation["score"][valid].astype(np.float64)
            sums = np.bincount(which, scores, len(layers))
            counts = np.bincount(which, minlength=len(layers))
            for pair, *found in zip(layers.pairs, sums, counts, strict=True):
                totals[pair] = totals.get(pair, 0) + np.array(found)
        by_depth = sorted(totals.items(), key=lambda item: item[0][1])
        return {pair: float(total / count) if count else float("nan") for pair, (total, count) in by_depth}


def _manifest(path: Path) -> tuple[dict[str, Any], dict[str, int] | None]:
    """What made the files, and how many there are; None until the data end."""
    try:
        manifest = json.loads(path.read_bytes())
        check_format(path, manifest["format"])
        return manifest["settings"], manifest["totals"]
    except OSError as error:
        raise CorruptFileError(
            f"{path} cannot be read ({error.strerror}). Give the folder that explain_to wrote.", path=path
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path} is not a manifest of explain_to ({error}). Explain again, into another folder.", path=path
        ) from error


_WAY_OUT = "Or choose another folder, or overwrite what is there (overwrite=True, --overwrite)."


def remove(folder: Path) -> None:
    """Remove only what explain_to wrote, or a single `.parquet` file in the folder's place.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        if folder.is_file() and folder.suffix == ".parquet":
            folder.unlink()
        if folder.is_dir():
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name) or path.name.startswith((".part-", f".{MANIFEST}-")):
                    path.unlink()
            (folder / MANIFEST).unlink(missing_ok=True)  # last, so that a killed call leaves it with the other files
    except OSError as error:
        raise StorageError(f"{folder} cannot be removed ({error.strerror}). Choose another.", path=folder) from error


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    with atomic_open(path) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return the differences between two trees of settings, as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [text for key in keys for text in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
