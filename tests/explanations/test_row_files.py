"""Explanations in Parquet files and folders: what comes back, and which files are refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from maskhooks.errors import CorruptFileError, FormatError, SettingError
from maskhooks.explanations import row_files as rowfiles
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.sites.site import Site


@pytest.fixture
def explanation() -> Explanation:
    tokens = Site.parse("embed:output", "batch token hidden -> batch token")
    heads = Site.parse("attention:output[0]", "batch token (head dim) -> batch token head, head=2")
    valid = torch.tensor([[True, True, True], [True, False, False]])
    names = [["a", "</script>", "\n"], ["ü"]]
    scores = [
        Scores(tokens, 0, torch.rand(2, 3), valid, names),
        Scores(heads, 1, torch.tensor([[[0.1, float("nan")]] * 3] * 2), valid, names),
    ]
    return Explanation.build(
        scores, provenance={"seed": 3, "parts": ["x"]}, metadata=[{"target": "t"}, {}], start_index=7
    )


@pytest.fixture
def folder(explanation: Explanation, tmp_path: Path) -> Path:
    explanation.save(tmp_path / "deep" / "folder")
    return tmp_path / "deep" / "folder"


def test_folder_and_back(explanation: Explanation, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["explanation.json", "explanation.safetensors"]
    again = Explanation.load(folder)
    assert again == explanation
    assert {n: c.dtype for n, c in again.columns.items()} == {n: c.dtype for n, c in explanation.columns.items()}


def test_parquet_and_back(explanation: Explanation, tmp_path: Path) -> None:
    explanation.to_parquet(tmp_path / "rows.parquet")
    again = Explanation.from_parquet(tmp_path / "rows.parquet")
    assert again == explanation
    assert {n: c.dtype for n, c in again.columns.items()} == {n: c.dtype for n, c in explanation.columns.items()}
    assert parquet.read_table(tmp_path / "rows.parquet").to_pandas()["site"].tolist() == list(explanation["site"])


def test_a_selection_without_rows_survives(explanation: Explanation, tmp_path: Path) -> None:
    empty = explanation.select(example=7, valid=False)
    assert len(empty) == 0
    empty.save(tmp_path)
    empty.to_parquet(tmp_path / "rows.parquet")
    assert Explanation.load(tmp_path) == empty == Explanation.from_parquet(tmp_path / "rows.parquet")


def test_explanations_differ_by_any_part(explanation: Explanation) -> None:
    same = Explanation(dict(explanation.columns), explanation.sites, explanation.provenance, explanation.metadata)
    assert same == explanation
    changed = {**explanation.columns, "score": explanation["score"] + np.float32(1e-3)}
    assert Explanation(changed, same.sites, same.provenance, same.metadata) != explanation
    assert Explanation(same.columns, same.sites[::-1], same.provenance, same.metadata) != explanation
    assert Explanation(same.columns, same.sites, {}, same.metadata) != explanation
    assert Explanation(same.columns, same.sites, same.provenance, {}) != explanation
    assert explanation != "text"


def _rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize("name", ["explanation.json", "explanation.safetensors"])
@pytest.mark.parametrize("what", ["missing", "cut", "empty", "pickle", "torch"])
def test_a_broken_file_is_named(folder: Path, name: str, what: str) -> None:
    path = folder / name
    data = path.read_bytes()
    if what == "torch":
        torch.save({"a": torch.ones(1)}, path)
    elif what == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "pickle": pickle.dumps([1])}[what])
    with pytest.raises(CorruptFileError, match=r"Explanation\.load") as caught:
        Explanation.load(folder)
    assert caught.value.path == path
    assert ("pickle" in str(caught.value)) == (what in ("pickle", "torch"))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("sites"),
        lambda about: about.update(rows=3),
        lambda about: about.update(sites=["only one"]),
        lambda about: about.update(labels=["only one"]),
        lambda about: about.update(columns=["score"]),
        lambda about: about.update(metadata=[1]),
        lambda about: about.update(provenance=None),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    folder: Path, change: Callable[[dict[str, object]], object]
) -> None:
    _rewrite(folder / "explanation.json", change)
    with pytest.raises(CorruptFileError, match=str(folder)):
        Explanation.load(folder)


def test_the_first_versions_files_are_refused_by_their_format(
    explanation: Explanation, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rewrite(folder / "explanation.json", lambda about: about.update(format=1))
    with pytest.raises(FormatError, match=r"has format 1, which maskhooks 0\.1\.0 wrote; this version reads format 2"):
        Explanation.load(folder)
    monkeypatch.setattr("maskhooks.explanations.row_files.FORMAT", 1)
    explanation.to_parquet(tmp_path / "old.parquet")
    with pytest.raises(FormatError, match=r"old\.parquet has format 1"):
        Explanation.from_parquet(tmp_path / "old.parquet")


def test_other_parquet_files_are_refused(explanation: Explanation, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(CorruptFileError, match="cannot be read"):
        Explanation.from_parquet(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(CorruptFileError, match="pickle"):
        Explanation.from_parquet(path)
    parquet.write_table(pa.table({"score": [1.0]}), path)
    with pytest.raises(CorruptFileError, match="did not write it"):
        Explanation.from_parquet(path)
    explanation.to_parquet(path)
    parquet.write_table(parquet.read_table(path).drop_columns(["kept"]), path)
    with pytest.raises(CorruptFileError, match="no column kept"):
        Explanation.from_parquet(path)
    explanation.to_parquet(path)
    table = parquet.read_table(path)
    index = table.column_names.index("score")
    parquet.write_table(table.set_column(index, "score", pa.array(["x"] * len(table))), path)
    with pytest.raises(CorruptFileError, match="score"):
        Explanation.from_parquet(path)


@pytest.fixture
def shards(explanation: Explanation, tmp_path: Path) -> Path:
    """A folder with the examples 7 and 8 in a file each, and files that are none of them."""
    folder = tmp_path / "rows.parquet"
    folder.mkdir()
    for number in (8, 7):
        explanation.select(example=number, valid=None).to_parquet(folder / f"part-{number}.parquet")
    (folder / "_manifest.json").write_text("{}")
    (folder / ".part-9.parquet-x.partial").write_bytes(b"half")
    return folder


def test_a_folder_is_read_like_a_file(explanation: Explanation, shards: Path) -> None:
    again = Explanation.from_parquet(shards)
    assert len(again) == len(explanation)
    assert again.metadata == explanation.metadata
    assert again.provenance == explanation.provenance
    for number in (7, 8):
        assert again.select(example=number, valid=None) == explanation.select(example=number, valid=None)
    assert len(pd.read_parquet(shards)) == len(explanation)


@pytest.mark.parametrize("wanted", [7, [8], [7, 8]])
def test_examples_are_chosen_while_reading(explanation: Explanation, shards: Path, tmp_path: Path, wanted: Any) -> None:
    explanation.to_parquet(tmp_path / "one.parquet")
    found = explanation.select(example=wanted, valid=None)
    for path in (shards, tmp_path / "one.parquet"):
        again = Explanation.from_parquet(path, example=wanted)
        assert again.metadata == found.metadata
        np.testing.assert_array_equal(np.sort(again["score"]), np.sort(found["score"]))
        with pytest.raises(SettingError, match=r"parquet has no example 3\."):
            Explanation.from_parquet(path, example=3)


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="a folder without Parquet files"):
        Explanation.from_parquet(tmp_path)


def test_a_label_column_without_a_dictionary_is_read(explanation: Explanation, tmp_path: Path) -> None:
    """As other tools write it."""
    path = tmp_path / "rows.parquet"
    explanation.to_parquet(path)
    table = parquet.read_table(path)
    for name in ("label", "site"):
        plain = table[name].cast(pa.string())
        table = table.set_column(table.column_names.index(name), name, plain)
    parquet.write_table(table, path)
    assert Explanation.from_parquet(path) == explanation


def test_pieces_hold_each_example_once(explanation: Explanation, tmp_path: Path) -> None:
    whole = Explanation.concat([explanation, replace(explanation, metadata={}, columns={
        **explanation.columns, "example": explanation["example"] + 5})])  # fmt: skip
    whole.to_parquet(tmp_path / "whole.parquet")
    assert len(whole) == 36
    assert rowfiles.pieces(tmp_path / "whole.parquet", 36) == [{7, 8, 12, 13}]
    assert rowfiles.pieces(tmp_path / "whole.parquet", 35) == [{7, 8}, {12, 13}]
    with pytest.raises(CorruptFileError, match="cannot be read"):
        rowfiles.pieces(tmp_path / "none.parquet", 9)
