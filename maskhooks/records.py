"""Records: texts and labels, read from trees, csv, jsonl, Parquet or a dataset of the `datasets` library.

Importing this imports none of the libraries that read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskhooks.errors import CorruptFileError, PluginError, SettingError, near

if TYPE_CHECKING:
    import pandas as pd

Label = int | float | str


@dataclass(frozen=True)
class Record:
    """One example as text.

    Args:
        text: a sentence, or the first of a pair such as a question.
        second: the second of a pair, such as a context.
        label: a class by number or name, or a number to be predicted; None where it is not known.
    """

    text: str
    second: str | None = None
    label: Label | None = None


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called.

    Args:
        text: the column of texts.
        second: the column of second texts; None for single texts.
        label: the column of labels; None for "label" where there is one.
    """

    text: str = "text"
    second: str | None = None
    label: str | None = None


def read(data: str, columns: Columns | None = None) -> list[Record]:
    """All records of a file, or of a dataset.

    Args:
        data: a file (`.txt` with SST trees; `.csv`, `.tsv`, `.jsonl`, also with `.gz`; `.parquet`), or a
            dataset of the `datasets` library as `name:split` or `name:configuration:split`.
        columns: for all but trees, which columns hold what.

    Raises:
        CorruptFileError: a file that is missing, empty, broken, or of an unknown kind; a dataset that cannot
            be loaded.
        SettingError: a column that is not there; near names are listed.
        PluginError: `datasets` is needed and not installed.
    """
    path, columns = Path(data), columns or Columns()
    kind = next((kind for kind in (".txt", *_TABLES) if data.lower().endswith(kind)), "")
    if kind == ".txt":
        found = list(_trees(path))
    elif kind:
        found = _records(_table(path, kind), data, columns)
    elif ":" in data and not path.exists():
        found = _records(_dataset(data), data, columns)
    else:
        raise CorruptFileError(
            f"{data!r} is no kind of data that is known here. Give a file that ends in .txt (SST trees), "
            f"{', '.join(_TABLES)}, or a dataset of the datasets library with its split, as in "
            "'sst2:validation'.",
            path=path,
        )
    if not found:
        raise CorruptFileError(f"{data} holds no example. Give a file with at least one.", path=path)
    return found


# Trees: (3 (2 It) (4 (2 's) ...)), one a line. Words may hold a no-break space, so only the ASCII blank
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
                f"{path}, line {number} is no SST tree such as (3 (2 It) (4 works)): {tree[:60]!r}. Plain "
                "texts are read from .csv or .jsonl, with a column 'text'.",
                path=path,
            )
        text = _ESCAPE.sub(lambda found: _ESCAPED[found[0]], " ".join(words))
        yield Record(text, label=int(match["label"]))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


# Tables


def _csv(path: Path, separator: str = ",") -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(path, sep=separator, keep_default_na=False)  # the words NA and null are texts


def _jsonl(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_json(path, lines=True, dtype=False)


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(path)


_TABLES: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _csv,
    ".csv.gz": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".tsv.gz": lambda path: _csv(path, "\t"),
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".parquet": _parquet,
}


def _table(path: Path, kind: str) -> pd.DataFrame:
    try:
        return _TABLES[kind](path)
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors derive from ValueError
        raise _unreadable(path, error) from error


def _dataset(data: str) -> pd.DataFrame:
    """A split of a dataset: `name:split`, or `name:configuration:split`."""
    try:
        import datasets
    except ImportError as error:
        raise PluginError(
            f"data from {data!r} needs the library datasets, which is not installed. Run: pip install datasets"
        ) from error
    name, *configuration, split = data.split(":")
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        frame: pd.DataFrame = datasets.load_dataset(name, *configuration, split=split).to_pandas()
        return frame
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptFileError(
            f"the dataset {data!r} cannot be loaded: {_first_line(error)}. It is given as name:split or "
            f"name:configuration:split; a file is given by its path.",
            path=data,
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _records(table: pd.DataFrame, data: str, columns: Columns) -> list[Record]:
    if table.empty:
        return []
    texts = _column(table, data, columns.text, "--text-column")
    seconds: Sequence[Any] = [None] * len(table)
    labels: Sequence[Any] = [None] * len(table)
    if columns.second is not None:
        seconds = _column(table, data, columns.second, "--second-column")
    if columns.label is not None or "label" in table.columns:
        labels = _column(table, data, columns.label or "label", "--label-column")
    return [
        Record(str(text), None if second is None else str(second), _label(label))
        for text, second, label in zip(texts, seconds, labels, strict=True)
    ]


def _column(table: pd.DataFrame, data: str, name: str, option: str) -> list[Any]:
    names = [str(column) for column in table.columns]
    if name not in names:
        likely = near(name, names)
        raise SettingError(
            f"{data} has no column {name!r}; it has {', '.join(names)}. Name the right one with {option}"
            + (f" {likely[0]}." if likely else ".")
        )
    values: list[Any] = table[name].tolist()
    return values


def _label(value: Any) -> Label | None:
    """A label as read: None where a table has none."""
    if value is None or value != value or value == "":
        return None
    return value if isinstance(value, (int, float, str)) else str(value)


def _unreadable(path: Path, error: Exception) -> CorruptFileError:
    what = f"there is no file {path}" if isinstance(error, FileNotFoundError) else f"{path} cannot be read"
    why = "" if isinstance(error, FileNotFoundError) else f": {_first_line(error)}"
    return CorruptFileError(f"{what}{why}. Give a file that exists, of the kind that its name says.", path=path)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
