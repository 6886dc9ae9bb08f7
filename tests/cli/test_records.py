"""Records from every format, and every way in which a file can be wrong."""

from __future__ import annotations

import builtins
import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from maskhooks.data.records import Columns, Record, identity, read, stream
from maskhooks.errors import CorruptFileError, PluginError, SettingError

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
    with pytest.raises(CorruptFileError, match=r"trees\.txt, line 2 is not an SST tree") as caught:
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
    assert read(str(path), columns)[1] == Record("null", text_pair="NA", label="null")


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
    with pytest.raises(CorruptFileError, match=r"has no examples|cannot be read"):
        read(str(path))
    path.write_bytes(b'{"text": \xff\xfe"')
    with pytest.raises(CorruptFileError, match=r"cannot be read|not an SST tree"):
        read(str(path))


def test_csv_with_a_header_only(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "data.csv.gz", "wt") as file:
        file.write("text,label\n")
    with pytest.raises(CorruptFileError, match="has no examples"):
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


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "tsv", "txt"])
def test_records_come_one_by_one(tmp_path: Path, kind: str) -> None:
    """What comes much later may be broken: it is not read."""
    path = tmp_path / f"data.{kind}"
    line = {"js": '{"text": "good film", "label": 3}', "tx": "(3 (2 good) (2 film))"}.get(kind[:2], "3\tgood film")
    header = [] if kind[:2] in ("js", "tx") else ["label\ttext"]
    lines = [*header, *[line] * 20000, "(broken\t\t\t" if kind[:2] != "tx" else "broken"]
    text = "\n".join(lines).replace("\t", "," if kind.startswith("csv") else "\t")
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    records = stream(str(path))
    assert [next(records) for _ in range(5)] == [Record("good film", label=3)] * 5
    with pytest.raises(CorruptFileError, match=r"cannot be read|not an SST tree"):
        list(records)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    peaks = []
    for count in (8_000, 40_000):
        path = tmp_path / f"{count}.{kind}"
        frame = pd.DataFrame({"text": ["a film of some length"] * count, "label": [1] * count})
        WRITE_ANY[kind](frame, path)
        tracemalloc.start()
        pyarrow = pa.total_allocated_bytes()
        highest = 0
        for number, _ in enumerate(stream(str(path))):
            if number % 1024 == 0:
                highest = max(highest, pa.total_allocated_bytes() - pyarrow)
        peaks.append(tracemalloc.get_traced_memory()[1] + highest)
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 2**20


WRITE_ANY = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path, row_group_size=4096),
}


def test_numbers_in_csv_do_not_depend_on_their_column(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\n007,1\n1.50,-2.5\n,x\n1e3,\nnan,nan\n")
    assert [(record.text, record.label) for record in stream(str(path))] == [
        ("007", 1),
        ("1.50", -2.5),
        ("", "x"),
        ("1e3", None),
        ("nan", "nan"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.jsonl", '{"text": "a"}\n\n{"text": null}\n', "record 2 has no text"),
        ("data.jsonl", '{"text": "a"}\n{"texts": "b"}\n', "record 2 has no text"),
        ("data.jsonl", '{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("data.jsonl", '{"text": "a"}\n"text"\n', "line 2 is not a JSON object"),
        ("data.csv", 'text\na\n"b\n', "cannot be read"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptFileError, match=message):
        read(str(tmp_path / name))


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv.gz"
    FRAME.to_csv(path, index=False)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(CorruptFileError, match="cannot be read"):
        read(str(path))


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").mkdir()
    for number in (1, 0):
        FRAME.assign(label=number).to_parquet(tmp_path / "data.parquet" / f"{number}.parquet")
    assert [record.label for record in stream(str(tmp_path / "data.parquet"))] == [0, 0, 1, 1]


def test_data_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\na\n")
    first = identity(str(path))
    path.touch()
    assert identity(str(path)) == first
    path.write_text("text\nb\n")
    assert identity(str(path)) != first
    assert identity("sst2:validation") == {"name": "sst2:validation"}
