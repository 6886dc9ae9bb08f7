"""The store of a comparison: what was explained and judged, batch by batch, in memory or also in a folder.

The folder holds `comparison.json`, and Parquet files of each method: `explained/METHOD/part-000000.parquet` are rows of
an explanation, with the time they took; `judged/METHOD/part-000000.parquet` have a row for each metric, site, depth and
example. Each file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskhooks.atomic_write import atomic_open, clear
from maskhooks.comparison.judging import Judged
from maskhooks.errors import CorruptFileError, FormatError, ResumeError, StorageError
from maskhooks.explanations import row_files
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.shards import differences
from maskhooks.metrics.erasure import Curves
from maskhooks.settings.format import FORMAT, check_format

MANIFEST = "comparison.json"
_WAY_OUT = "Choose another folder, or delete this one."


@dataclass(frozen=True, eq=False)
class Explained:
    """A batch explained by a method.

    Attributes:
        explanation: the scores.
        seconds: how long that took; NaN for scores that were there already.
        first: whether it was the method's first batch in its process, which may take longer.
        fit_seconds: how long the method was trained; None if it was not, or nobody knows.
    """

    explanation: Explanation
    seconds: float
    first: bool
    fit_seconds: float | None

    @property
    def examples(self) -> int:
        """The number of examples."""
        return len(np.unique([*np.unique(self.explanation["example"]), *self.explanation.metadata]))


class Store:
    """What each method made of each batch.

    Args:
        settings: what was compared; JSON-serialisable. `settings["methods"]` are by label.
        folder: where it is kept; None keeps it in memory alone.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path | None = None) -> None:
        self.settings, self.folder = dict(settings), folder
        self._explained: dict[tuple[str, int], Explained] = {}
        self._judged: dict[tuple[str, int], list[Judged]] = {}

    @classmethod
    def open(cls, settings: Mapping[str, Any], folder: Path | None) -> Store:
        """Start a store, or go on with one that was started with the same settings.

        Raises:
            ResumeError: the folder holds another comparison; the error lists the differences.
            StorageError: it cannot be written to.
        """
        made = json.loads(json.dumps(settings))
        if folder is None:
            return cls(made)
        _writable(folder / MANIFEST)
        if (folder / MANIFEST).exists():
            found = differences(_manifest(folder), made)
            if found:
                raise ResumeError(
                    f"{folder} holds another comparison: {'; '.join(found[:5])}"
                    + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
                    + f". Compare the same methods, metrics and data to go on with it. {_WAY_OUT}",
                    path=folder,
                    differences=found,
                )
        else:
            if any((folder / name).exists() for name in ("explained", "judged")):
                raise ResumeError(f"{folder} holds a comparison without {MANIFEST}. {_WAY_OUT}", path=folder)
            _write(folder, made)
        store = cls(made, folder)
        store._read(broken=False)
        return store

    @classmethod
    def load(cls, folder: Path) -> Store:
        """Read a store.

        Raises:
            CorruptFileError: a file is missing or broken.
        """
        store = cls(_manifest(folder), folder)
        store._read(broken=True)
        return store

    def save(self, folder: Path) -> None:
        """Write everything into a folder, which holds this comparison or none."""
        other = Store.open(self.settings, folder)
        for label, number in sorted(self._explained.keys() - other._explained.keys()):
            other.add_explained(label, number, self._explained[label, number])
        for label, number in sorted(self._judged.keys() - other._judged.keys()):
            other.add_judged(label, number, self._judged[label, number])

    @property
    def labels(self) -> list[str]:
        """The labels of the methods, in order."""
        return list(self.settings["methods"])

    def explained(self, label: str, number: int) -> Explained | None:
        """Return what a method made of a batch; None if it has not yet."""
        return self._explained.get((label, number))

    def judged(self, label: str, number: int) -> list[Judged] | None:
        """Return what metrics say of it; None if they have not yet."""
        return self._judged.get((label, number))

    @property
    def numbers(self) -> list[int]:
        """The numbers of the batches that all methods explained, and that metrics judged, in order."""
        both = self._judged.keys() & self._explained.keys()
        return sorted(set.intersection(*({number for one, number in both if one == label} for label in self.labels)))

    def add_explained(self, label: str, number: int, made: Explained) -> None:
        """Keep what a method made of a batch."""
        self._explained[label, number] = made
        if self.folder is None:
            return
        about = {"seconds": made.seconds, "first": made.first, "fit_seconds": made.fit_seconds}
        one = made.explanation
        path = _writable(self._path("explained", label, number))
        row_files.write_parquet(
            path,
            one.columns,
            {"sites": list(one.sites), "provenance": one.provenance, "metadata": one.metadata, **about},
        )
        clear(path)

    def add_judged(self, label: str, number: int, made: Sequence[Judged]) -> None:
        """Keep what metrics say of it."""
        self._judged[label, number] = list(made)
        if self.folder is not None:
            path = _writable(self._path("judged", label, number))
            _write_judged(path, made)
            clear(path)

    def fit_folder(self, label: str) -> Path | None:
        """Return where a method that is fitted here keeps its run."""
        return None if self.folder is None else self.folder / "fitted" / self._name(label)

    def _read(self, *, broken: bool) -> None:
        """Read all files; a broken one is an error, or else as if it were not there."""
        assert self.folder is not None
        for label in self.labels:
            for kind in ("explained", "judged"):
                for path in sorted(self._path(kind, label, 0).parent.glob("part-*.parquet")):
                    number = int(path.stem.removeprefix("part-"))
                    try:
                        if kind == "explained":
                            self._explained[label, number] = _read_explained(path)
                        else:
                            self._judged[label, number] = _read_judged(path)
                    except CorruptFileError:
                        if broken:
                            raise

    def _path(self, kind: str, label: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / kind / self._name(label) / f"part-{number:06d}.parquet"

    def _name(self, label: str) -> str:
        """Return the name of a method's folders, in order and safe in any file system."""
        return f"{self.labels.index(label):02d}-{re.sub(r'[^A-Za-z0-9.-]+', '_', label)[:60]}"


def _writable(path: Path) -> Path:
    """Return a path, in a folder that is made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path.parent} cannot be made ({error.strerror}). Choose another folder.", path=path.parent
        ) from error
    return path


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    with atomic_open(folder / MANIFEST) as file:
        file.write(json.dumps({"format": FORMAT, "settings": settings}, indent=1).encode())


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        check_format(path, found["format"])
        settings: dict[str, Any] = found["settings"]
        if not isinstance(settings["methods"], dict) or not isinstance(settings["metrics"], dict):
            raise ValueError("methods and metrics are not by label")
        return settings
    except OSError as error:
        raise CorruptFileError(
            f"{path} cannot be read ({error.strerror}). Give the folder of a comparison.", path=path
        ) from error
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is not what a comparison writes ({error}). {_WAY_OUT}", path=path) from error


def _read_explained(path: Path) -> Explained:
    columns, about = row_files.read_parquet(path)
    with _reading(path):
        explanation = Explanation(columns, tuple(about["sites"]), about["provenance"], about["metadata"])
        return Explained(explanation, float(about["seconds"]), bool(about["first"]), about["fit_seconds"])


def _write_judged(path: Path, made: Sequence[Judged]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def joined(name: str) -> list[Any]:
        return [value for one in made for value in [getattr(one, name)] * len(one.examples)]

    def lines(name: str) -> list[Any]:
        return [
            row
            for one in made
            for row in (getattr(one.curves, name).tolist() if one.curves is not None else [None] * len(one.examples))
        ]

    empty = np.empty(0)
    curve = pa.list_(pa.float64())
    table = pa.table(
        {
            "metric": pa.array(joined("metric"), pa.string()).dictionary_encode(),
            "site": pa.array(joined("site"), pa.string()).dictionary_encode(),
            "depth": pa.array(joined("depth"), pa.int32()),
            "example": pa.array(np.concatenate([empty, *(one.examples for one in made)]).astype(np.int64)),
            "value": pa.array(np.concatenate([empty, *(one.values for one in made)])),
            **{name: pa.array(lines(name), curve) for name in ("shares", "highest_first", "lowest_first")},
        }
    )
    with atomic_open(path) as file:
        parquet.write_table(table, file, compression="zstd")


def _read_judged(path: Path) -> list[Judged]:
    from pyarrow import parquet

    with _reading(path):
        table = parquet.read_table(path, partitioning=None).to_pydict()
        groups: dict[tuple[str, str, int], list[int]] = {}
        for row, key in enumerate(zip(table["metric"], table["site"], table["depth"], strict=True)):
            groups.setdefault(key, []).append(row)
        found = []
        for (metric, site, depth), rows in groups.items():
            examples = np.array([table["example"][row] for row in rows], np.int64)
            values = np.array([table["value"][row] for row in rows], np.float64)
            curves = None
            if table["shares"][rows[0]] is not None:
                names = ("shares", "highest_first", "lowest_first")
                curves = Curves(*(np.array([table[name][row] for row in rows], np.float64) for name in names))
            found.append(Judged(metric, site, depth, examples, values, curves))
        return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken file can raise anything; we keep the error as the cause
        raise CorruptFileError(
            f"{path} is not what a comparison writes ({error}). Delete it, and compare again to make it anew.",
            path=path,
        ) from error
