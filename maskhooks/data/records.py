"""Records: texts and labels, read from SST trees, CSV, JSONL, Parquet or a dataset of the `datasets` library.

Importing this module does not import the libraries that read.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskhooks.errors import CorruptFileError, MaskhooksError, PluginError, SettingError, close_matches

Label = int | float | str


@dataclass(frozen=True)
class Record:
    """One example as text.

    Args:
        text: a sentence, or the first text of a pair, such as a question.
        text_pair: the second text of a pair, such as a context.
        label: a class number or name, or a regression target; None if unknown.
    """

    text: str
    text_pair: str | None = None
    label: Label | None = None


@dataclass(frozen=True)
class Columns:
    """The column names of a table.

    Args:
        text: the column of texts.
        second: the column of second texts; None for single texts.
        label: the column of labels; None means "label", if the table has one.
    """

    text: str = "text"
    second: str | None = None
    label: str | None = None


def read(data: str, columns: Columns | None = None) -> list[Record]:
    """Return all records of a file or dataset: `stream` as a list."""
    return list(stream(data, columns))


def stream(data: str, columns: Columns | None = None) -> Iterator[Record]:
    """Yield the records of a file or dataset, with a few thousand in memory at a time.

    Args:
        data: a file (`.txt` with SST trees; `.csv`, `.tsv`, `.jsonl`, each also as `.gz`; `.parquet`, also a folder),
            or a dataset of the `datasets` library as `name:split` or `name:configuration:split`.
        columns: the column names; not used for trees.

    Raises:
        CorruptFileError: a file is missing, empty, broken, or of an unknown kind; a record has no text; a dataset
            cannot be loaded.
        SettingError: there is no such column; the error lists similar names.
        PluginError: `datasets` is needed but not installed.
    """
    path, columns = Path(data), columns or Columns()
    found = None
    for found in _any(data, path, columns):
        yield found
    if found is None:
        raise CorruptFileError(f"{data} has no examples. Give a file with at least one.", path=path)


def identity(data: str) -> dict[str, Any]:
    """Identify data without reading them all: by name, and a file also by its size and first megabyte."""
    path = Path(data)
    if not path.is_file():
        return {"name": data}
    with path.open("rb") as file:
        return {"name": path.name, "bytes": path.stat().st_size, "head": hashlib.sha256(file.read(2**20)).hexdigest()}


def _any(data: str, path: Path, columns: Columns) -> Iterator[Record]:
    kind = next((kind for kind in (".txt", *_TABLES) if data.lower().endswith(kind)), "")
    if kind == ".txt":
        return _trees(path)
    if kind:
        return _records(_TABLES[kind](path, columns), data)
    if ":" in data and not path.exists():
        return _records(_dataset(data, columns), data)
    raise CorruptFileError(
        f"{data!r} is not a known kind of data. Give a file that ends in .txt (SST trees), {', '.join(_TABLES)}, or a "
        "dataset of the datasets library with its split, such as 'sst2:validation'.",
        path=path,
    )


# Trees: (3 (2 It) (4 (2 's) ...)), one per line. Words may contain a no-break space, so only the ASCII space
# separates.

_TREE = re.compile(r"\((?P<label>\d) .*\)")
_LEAF = re.compile(r"\(\d ([^() ]+)\)")
_ESCAPED = {"-LRB-": "(", "-RRB-": ")", r"\/": "/", r"\*": "*"}
_ESCAPE = re.compile("|".join(map(re.escape, _ESCAPED)))


def _trees(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        tree = line.strip(" \r\n")
        if not tree:
            continue
        match, words = _TREE.fullmatch(tree), _LEAF.findall(tree)
        if match is None or not words or tree.count("(") != tree.count(")"):
            raise CorruptFileError(
                f"{path}, line {number} is not an SST tree such as (3 (2 It) (4 works)): {tree[:60]!r}. Give plain "
                "texts as .csv or .jsonl, with a column 'text'.",
                path=path,
            )
        text = _ESCAPE.sub(lambda found: _ESCAPED[found[0]], " ".join(words))
        yield Record(text, label=int(match["label"]))


def _lines(path: Path) -> Iterator[str]:
    with _readable(path), _text(path) as file:
        yield from file


def _text(path: Path) -> io.TextIOBase:
    return io.TextIOWrapper(gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb"), encoding="utf-8")


# Tables come in chunks: lists of equal length under "text" and, if requested, "text_pair" and "label". Numbers in CSV
# files are parsed one by one, so that no value depends on the rest of its column.

_CHUNK = 2048
Chunk = Mapping[str, Sequence[Any]]


def _csv(path: Path, columns: Columns, separator: str = ",") -> Iterator[Chunk]:
    import pandas as pd

    # "NA" and "null" are texts.
    settings: dict[str, Any] = {"sep": separator, "keep_default_na": False, "dtype": str, "chunksize": _CHUNK}
    with _readable(path), pd.read_csv(path, **settings) as reader:
        for frame in reader:
            names = _named(columns, list(frame.columns), path)
            chunk = {use: frame[name].tolist() for use, name in names.items()}
            yield {**chunk, "label": list(map(_number, chunk["label"]))} if "label" in chunk else chunk


def _tsv(path: Path, columns: Columns) -> Iterator[Chunk]:
    return _csv(path, columns, "\t")


def _jsonl(path: Path, columns: Columns) -> Iterator[Chunk]:
    names: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorruptFileError(
                f"{path} cannot be read: line {number} is not JSON ({error}). Give a JSON object on each line.",
                path=path,
            ) from error
        if not isinstance(row, dict):
            raise CorruptFileError(
                f"{path} cannot be read: line {number} is not a JSON object. Give one on each line, such as "
                '{"text": "It works"}.',
                path=path,
            )
        names = names or _named(columns, list(row), path)
        yield {use: [row.get(name)] for use, name in names.items()}


def _parquet(path: Path, columns: Columns) -> Iterator[Chunk]:
    from pyarrow import parquet

    for part in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        with _readable(part), parquet.ParquetFile(part, pre_buffer=False) as file:
            names = _named(columns, file.schema_arrow.names, part)
            for batch in file.iter_batches(_CHUNK, columns=list(set(names.values())), use_threads=False):
                chunk = batch.to_pydict()
                yield {use: chunk[name] for use, name in names.items()}


_TABLES: Mapping[str, Callable[[Path, Columns], Iterator[Chunk]]] = {
    ".csv": _csv,
    ".csv.gz": _csv,
    ".tsv": _tsv,
    ".tsv.gz": _tsv,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".parquet": _parquet,
}


def _dataset(data: str, columns: Columns) -> Iterator[Chunk]:
    """A split of a dataset: `name:split`, or `name:configuration:split`."""
    try:
        import datasets
    except ImportError as error:
        raise PluginError(
            f"data from {data!r} need the library datasets, which is not installed. Run: pip install datasets"
        ) from error
    name, *configuration, split = data.split(":")
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, *configuration, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptFileError(
            f"the dataset {data!r} cannot be loaded: {_first_line(error)}. Give it as name:split or "
            f"name:configuration:split, or give a file by its path.",
            path=data,
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    names = _named(columns, found.column_names, data)
    for chunk in found.select_columns(list(set(names.values()))).iter(_CHUNK):
        yield {use: chunk[name] for use, name in names.items()}


def _records(chunks: Iterable[Chunk], data: str) -> Iterator[Record]:
    number = 0
    for chunk in chunks:
        nothing = [None] * len(chunk["text"])
        pair = "text_pair" in chunk
        seconds, labels = chunk.get("text_pair", nothing), chunk.get("label", nothing)
        for text, second, label in zip(chunk["text"], seconds, labels, strict=True):
            number += 1
            known = _known(text, data, number)
            yield Record(known, _known(second, data, number) if pair else None, _label(label))


def _named(columns: Columns, there: Sequence[str], data: str | Path) -> dict[str, str]:
    """The column name for each use."""
    label = "label" if columns.label is None and "label" in there else columns.label
    wanted = {"text": columns.text, "text_pair": columns.second, "label": label}
    for use, name in wanted.items():
        if name is not None and name not in there:
            likely = close_matches(name, there)
            option = "second" if use == "text_pair" else use
            raise SettingError(
                f"{data} has no column {name!r}; it has {', '.join(there)}. Name the right one with --{option}-column"
                + (f" {likely[0]}." if likely else ".")
            )
    return {use: name for use, name in wanted.items() if name is not None}


def _known(text: Any, data: str, number: int) -> str:
    if text is None or text != text:
        raise CorruptFileError(
            f"{data} cannot be read: record {number} has no text. Remove such records.", path=Path(data)
        )
    return str(text)


def _number(label: Any) -> Any:
    """A label from a table of texts; a number if it reads as one."""
    if not isinstance(label, str) or not _NUMBER.fullmatch(label):
        return label
    return int(label) if label.lstrip("+-").isdigit() else float(label)


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def _label(value: Any) -> Label | None:
    """A label as read; None if it is missing."""
    if value is None or value != value or value == "":
        return None
    return value if isinstance(value, (int, float, str)) else str(value)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong while a file is read as one error with its path."""
    try:
        yield
    except MaskhooksError:  # some of them derive from ValueError
        raise
    # pandas' and pyarrow's own errors derive from ValueError; a truncated archive is an EOFError or a zlib.error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CorruptFileError:
    what = f"there is no file {path}" if isinstance(error, FileNotFoundError) else f"{path} cannot be read"
    why = "" if isinstance(error, FileNotFoundError) else f": {_first_line(error)}"
    return CorruptFileError(f"{what}{why}. Give an existing file whose format matches its extension.", path=path)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
