"""Records from every format, and every way in which a file can be wrong."""

from __future__ import annotations

import builtins
import gzip
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from maskhooks.errors import CorruptFileError, PluginError, SettingError
from maskhooks.records import Columns, Record, read

TREES = """(3 (2 It) (4 (4 (2 's) (4 good)) (2 .)))

(1 (2 -LRB-) (1 (1 (2 8\N{NO-BREAK SPACE}1\\/2) (1 bad)) (2 -RRB-)))
(2 \\*)
"""


def test_trees(tmp_path: Path) -> None:
    path = tmp_path / "trees.txt"
    path.write_text(TREES, encoding="utf-8")
    assert read(str(path)) == [
        Record("It 's good .", label=3),
        Record("( 8\N{NO-BREAK SPACE}1/2 bad )", label=1),
        Record("*", label=2),
    ]


@pytest.mark.parametrize("line", ["A plain text.", "(3 (2 It) (4 works)", "(3 It works)", "(x (2 It))"])
def test_line_that_is_no_tree(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trees.txt"
    path.write_text(f"(3 (2 It) (4 works))\n{line}\n")
    with pytest.raises(CorruptFileError, match=r"trees\.txt, line 2 is no SST tree") as caught:
        read(str(path))
    assert caught.value.path == path


FRAME = pd.DataFrame({"text": ["good film", "NA"], "label": [1, 0], "other": ["a", "null"]})
WRITE = {
    "csv": lambda path: FRAME.to_csv(path, index=False),
    "csv.gz": lambda path: FRAME.to_csv(path, index=False),
    "tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "jsonl.gz": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "parquet": lambda path: FRAME.to_parquet(path),
}


@pytest.mark.parametrize("kind", WRITE)
def test_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    WRITE[kind](path)
    assert read(str(path)) == [Record("good film", label=1), Record("NA", label=0)]
    columns = Columns(text="other", second="text", label="other")
    assert read(str(path), columns)[1] == Record("null", second="NA", label="null")


def test_table_without_labels(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": null}\n{"text": "b", "label": 2}\n')
    assert [record.label for record in read(str(tmp_path / "data.jsonl"))] == [None, 2]
    (tmp_path / "data.csv").write_text("text\n2004\n")
    assert read(str(tmp_path / "data.csv")) == [Record("2004")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(text="texts"), r"no column 'texts'; it has text, label, other.*--text-column text\.$"),
        (Columns(second="sentence"), r"no column 'sentence'.*--second-column\.$"),
        (Columns(label="labels"), r"no column 'labels'.*--label-column label\.$"),
    ],
)
def test_missing_column(tmp_path: Path, columns: Columns, message: str) -> None:
    FRAME.to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(SettingError, match=message):
        read(str(tmp_path / "data.csv"), columns)


@pytest.mark.parametrize("name", ["data.xlsx", "data", "data.gz", "folder"])
def test_unknown_format(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorruptFileError, match=r"\.txt \(SST trees\), \.csv, .*\.parquet, or a dataset"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["txt", *WRITE])
def test_missing_empty_and_broken_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    with pytest.raises(CorruptFileError, match="there is no file"):
        read(str(path))
    path.write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"holds no example|cannot be read"):
        read(str(path))
    path.write_bytes(b'{"text": \xff\xfe"')
    with pytest.raises(CorruptFileError, match=r"cannot be read|no SST tree"):
        read(str(path))


def test_csv_with_a_header_only(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "data.csv.gz", "wt") as file:
        file.write("text,label\n")
    with pytest.raises(CorruptFileError, match="holds no example"):
        read(str(tmp_path / "data.csv.gz"))


def test_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of files is a dataset too, and needs no network."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "validation.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    found = read("reviews:validation", Columns(text="sentence"))
    assert found == [Record("good", label=1), Record("bad", label=0)]
    with pytest.raises(CorruptFileError, match=r"'reviews:train' cannot be loaded.*name:split"):
        read("reviews:train")
    with pytest.raises(CorruptFileError, match="'no_such_dataset:test' cannot be loaded"):
        read("no_such_dataset:test")


def test_dataset_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(PluginError, match="pip install datasets"):
        read("sst2:validation")
