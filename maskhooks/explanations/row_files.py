"""Row files: Parquet (a file or a folder of files), or a folder with safetensors and JSON. Never pickles."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskhooks.atomic_write import atomic_open
from maskhooks.errors import CorruptFileError, FormatError
from maskhooks.explanations.scores import FIXED, Column, Columns
from maskhooks.settings.format import FORMAT, check_format

_ARRAYS, ABOUT = "explanation.safetensors", "explanation.json"
_TYPES: dict[str, type] = {"label": object, "valid": np.bool_, "score": np.float32, "kept": np.bool_}


def write_folder(folder: Path, columns: Columns, about: Mapping[str, Any]) -> None:
    """Write columns to `explanation.safetensors`, labels and the metadata `about` to `explanation.json`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    codes, labels = _encoded(columns["label"])
    arrays = {name: np.ascontiguousarray(column) for name, column in {**columns, "label": codes}.items()}
    save_file(arrays, folder / _ARRAYS)
    text = json.dumps({"format": FORMAT, "rows": len(codes), "columns": list(columns), "labels": labels, **about})
    (folder / ABOUT).write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> tuple[Columns, dict[str, Any]]:
    """Read what `write_folder` wrote.

    Raises:
        CorruptFileError: a file is missing, broken or a pickle, or the two do not belong together.
    """
    from safetensors.numpy import load

    with _content(folder / ABOUT) as data:
        about = _checked_about(json.loads(data.decode("utf-8")), folder)
        names, labels, rows = list(about["columns"]), np.array(about["labels"], dtype=object), about["rows"]
    with _content(folder / _ARRAYS) as data:
        arrays = load(data)
        if arrays.keys() != set(names) or any(array.shape != (rows,) for array in arrays.values()):
            raise ValueError(f"its columns are not those that {ABOUT} lists")
        arrays["label"] = labels[_within(arrays["label"], len(labels))]
        return _checked({name: arrays[name] for name in names}, about["sites"]), about


def write_parquet(path: Path, columns: Columns, about: Mapping[str, Any]) -> None:
    """Write columns, with dictionary-encoded sites and labels; `about` becomes the file's metadata `maskhooks`.

    Raises:
        StorageError: the file cannot be written; an existing file stays.
    """
    import pyarrow as pa
    from pyarrow import parquet

    arrays: dict[str, Any] = {
        **columns,
        "site": pa.DictionaryArray.from_arrays(columns["site"], pa.array(about["sites"], pa.string())),
        "label": pa.array(columns["label"], pa.string()).dictionary_encode(),
    }
    table = pa.table(arrays)
    text = json.dumps({"format": FORMAT, **about})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), "maskhooks": text})
    with atomic_open(path) as file:
        parquet.write_table(table, file, compression="zstd")


def parquet_files(path: Path, examples: Iterable[int] | None = None) -> list[Path]:
    """Return the Parquet files of a folder, sorted by name, or the file itself.

    Args:
        examples: only files that may hold one of these; if none does, the first file.

    Raises:
        CorruptFileError: the folder has no Parquet file.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
    if not found:
        raise _corrupt(path, "it is a folder without Parquet files")
    if examples is None:
        return found
    wanted = np.array(sorted(examples), np.int64)
    ends = [np.searchsorted(wanted, (first, last + 1)) for first, last in map(span, found)]
    return [file for file, (low, high) in zip(found, ends, strict=True) if low < high] or found[:1]


def read_parquet(path: Path, examples: Iterable[int] | None = None) -> tuple[Columns, dict[str, Any]]:
    """Read what `write_parquet` wrote.

    Args:
        examples: read only these; those the file does not hold are ignored.

    Raises:
        CorruptFileError: the file is missing, broken, or has the wrong columns.
    """
    from pyarrow import parquet

    chosen = None if examples is None else _filters(set(examples))
    with _opened(path), parquet.ParquetFile(path) as file:
        about = _about(file, path)
        columns = _columns(parquet.read_table(path, filters=chosen, partitioning=None), about["sites"])
    if examples is not None:
        about["metadata"] = {number: known for number, known in about["metadata"].items() if number in set(examples)}
    return columns, about


def span(path: Path) -> tuple[int, int]:
    """Return the lowest and highest example index in a Parquet file; (0, -1) if it has no rows.

    Raises:
        CorruptFileError: the file is missing, broken, or has no column `example`.
    """
    from pyarrow import compute, parquet

    with _opened(path), parquet.ParquetFile(path) as file:
        if not file.metadata.num_rows:
            return 0, -1
        number = file.schema_arrow.names.index("example")
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        known = [group.column(number).statistics for group in groups if group.num_rows]
        if all(found is not None and found.has_min_max for found in known):
            return min(found.min for found in known), max(found.max for found in known)
        ends = compute.min_max(file.read(["example"])["example"]).as_py()
        return ends["min"], ends["max"]


def _filters(examples: set[int]) -> list[tuple[str, str, Any]]:
    """Filters that select examples; the range lets Parquet skip row groups of other examples."""
    ends = [("example", ">=", min(examples)), ("example", "<=", max(examples))] if examples else []
    return [*ends, ("example", "in", examples)]


def pieces(path: Path, max_rows: int) -> list[set[int]]:
    """Split the examples of a Parquet file into sets with about `max_rows` rows each.

    Raises:
        CorruptFileError: the file is missing, broken, or has no column `example`.
    """
    from pyarrow import parquet

    with _opened(path), parquet.ParquetFile(path) as file:
        groups = [file.read_row_group(number, ["example"])["example"] for number in range(file.num_row_groups)]
        numbers = np.unique(np.concatenate([np.unique(group) for group in groups] or [np.empty(0, np.int32)]))
        parts = max(-(-file.metadata.num_rows // max_rows), 1)
        return [set(part.tolist()) for part in np.array_split(numbers, parts)]


def _about(file: Any, path: Path) -> dict[str, Any]:
    text = (file.schema_arrow.metadata or {}).get(b"maskhooks")
    if text is None:
        raise ValueError("Explanation.to_parquet did not write it")
    return _checked_about(json.loads(text), path)


def _columns(table: Any, sites: list[str]) -> Columns:
    """The columns of a table; equal labels share one string."""
    columns: Columns = {}
    for name in table.column_names:
        if name in ("site", "label"):
            column = table[name] if hasattr(table[name].type, "value_type") else table[name].dictionary_encode()
            column = column.unify_dictionaries().combine_chunks()
            words = column.dictionary.to_pylist()
            known = {site: number for number, site in enumerate(sites)}
            values = np.array([known[w] for w in words], np.int32) if name == "site" else np.array(words, dtype=object)
            columns[name] = values[column.indices.to_numpy()]
        else:
            columns[name] = table[name].to_numpy()
    return _checked(columns, sites)


def _checked_about(about: dict[str, Any], path: Path) -> dict[str, Any]:
    check_format(path, about["format"])
    examples = {int(number): dict(known) for number, known in about["metadata"].items()}
    return {
        **about,
        "metadata": examples,
        "sites": list(about["sites"]),
        "provenance": dict(about["provenance"]),
    }


def _checked(columns: Columns, sites: list[str]) -> Columns:
    missing = [name for name in FIXED if name not in columns]
    if missing:
        raise ValueError(f"it has no column {', '.join(missing)}")
    _within(columns["site"], len(sites))
    for name, column in columns.items():
        if column.dtype != _TYPES.get(name, np.int32):
            raise ValueError(f"its column {name} holds {column.dtype}")
    return columns


def _within(codes: Column, count: int) -> Column:
    if codes.dtype.kind != "i" or not bool(((codes >= 0) & (codes < count)).all()):
        raise ValueError("its indices point outside the listed values")
    return codes


def _encoded(values: Column) -> tuple[Column, list[str]]:
    """Codes, and the distinct values they stand for, in order of first appearance."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(value, len(numbers)) for value in values]
    return np.array(codes, np.int32), list(numbers)


@contextlib.contextmanager
def _content(path: Path) -> Iterator[bytes]:
    """A file's content; raises whatever goes wrong meanwhile as one error with the file's path."""
    with _opened(path):
        yield path.read_bytes()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong with a file meanwhile as one error with its path."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
        yield
    except FormatError:
        raise
    except OSError as error:
        raise _corrupt(path, f"it cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a broken file can raise anything; we keep the error as the cause
        if head[:1] == b"\x80" or head == b"PK\x03\x04":
            raise _corrupt(path, "it is a pickle, which is never loaded") from error
        raise _corrupt(path, f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path} is not a saved explanation ({what}). Save the explanation again: explanation.save(folder) and "
        f"Explanation.load(folder), or explanation.to_parquet(path) and Explanation.from_parquet(path).",
        path=path,
    )
