"""Rows in files: Parquet, or a folder of safetensors and JSON. Never a pickle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskhooks.errors import CorruptFileError
from maskhooks.scores import FIXED, Column, Columns

FORMAT = 1
_ARRAYS, _ABOUT = "explanation.safetensors", "explanation.json"
_TYPES: dict[str, type] = {"label": object, "real": np.bool_, "score": np.float32, "kept": np.bool_}


def write_folder(folder: Path, columns: Columns, about: Mapping[str, Any]) -> None:
    """Writes columns as `explanation.safetensors`, labels and what is `about` them as `explanation.json`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    codes, labels = _encoded(columns["label"])
    arrays = {name: np.ascontiguousarray(column) for name, column in {**columns, "label": codes}.items()}
    save_file(arrays, folder / _ARRAYS)
    text = json.dumps({"format": FORMAT, "rows": len(codes), "columns": list(columns), "labels": labels, **about})
    (folder / _ABOUT).write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> tuple[Columns, dict[str, Any]]:
    """The inverse of `write_folder`.

    Raises:
        CorruptFileError: a file is missing, broken, a pickle, or does not belong to the other.
    """
    from safetensors.numpy import load

    with _content(folder / _ABOUT) as data:
        about = _checked_about(json.loads(data.decode("utf-8")))
        names, labels, rows = list(about["columns"]), np.array(about["labels"], dtype=object), about["rows"]
    with _content(folder / _ARRAYS) as data:
        arrays = load(data)
        if arrays.keys() != set(names) or any(array.shape != (rows,) for array in arrays.values()):
            raise ValueError(f"its columns are not those that {_ABOUT} tells of")
        arrays["label"] = labels[_within(arrays["label"], len(labels))]
        return _checked({name: arrays[name] for name in names}, about["sites"]), about


def write_parquet(path: Path, columns: Columns, about: Mapping[str, Any]) -> None:
    """Writes columns, sites and labels as dictionaries; what is `about` them is the metadata `maskhooks`."""
    import pyarrow as pa
    from pyarrow import parquet

    codes, labels = _encoded(columns["label"])
    arrays: dict[str, Any] = {
        **columns,
        "site": pa.DictionaryArray.from_arrays(columns["site"], pa.array(about["sites"], pa.string())),
        "label": pa.DictionaryArray.from_arrays(codes, pa.array(labels, pa.string())),
    }
    table = pa.table(arrays)
    text = json.dumps({"format": FORMAT, **about})
    parquet.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), "maskhooks": text}), path)


def read_parquet(path: Path) -> tuple[Columns, dict[str, Any]]:
    """The inverse of `write_parquet`.

    Raises:
        CorruptFileError: the file is missing, broken, or holds other columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with _content(path) as data:
        table = parquet.read_table(pa.BufferReader(data))
        text = (table.schema.metadata or {}).get(b"maskhooks")
        if text is None:
            raise ValueError("it was not written by Explanation.to_parquet")
        about = _checked_about(json.loads(text))
        columns = {name: table[name].to_numpy() for name in table.column_names}
        numbers = {site: number for number, site in enumerate(about["sites"])}
        columns["site"] = np.array([numbers[site] for site in columns["site"]], np.int32)
        return _checked(columns, about["sites"]), about


def _checked_about(about: dict[str, Any]) -> dict[str, Any]:
    if about["format"] != FORMAT:
        raise ValueError(f"it has format {about['format']}, and this version of maskhooks reads {FORMAT}")
    examples = {int(number): dict(known) for number, known in about["examples"].items()}
    return {
        **about,
        "examples": examples,
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
        raise ValueError("its numbers do not count what is listed")
    return codes


def _encoded(values: Column) -> tuple[Column, list[str]]:
    """Numbers, and the different values they stand for, in order of first appearance."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(value, len(numbers)) for value in values]
    return np.array(codes, np.int32), list(numbers)


@contextlib.contextmanager
def _content(path: Path) -> Iterator[bytes]:
    """A file's content; whatever goes wrong with it meanwhile is one error, with the file's path."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _corrupt(path, f"it cannot be read ({error.strerror or error})") from error
    try:
        yield data
    except Exception as error:
        if data[:1] == b"\x80" or data[:4] == b"PK\x03\x04":
            raise _corrupt(path, "it is a pickle, which is never loaded") from error
        raise _corrupt(path, f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path} is no saved explanation ({what}). Save the explanation again: explanation.save(folder) and "
        f"Explanation.load(folder), or explanation.to_parquet(path) and Explanation.from_parquet(path).",
        path=path,
    )
