"""Shards: a folder of row files that is filled in several runs, by one maker, whole file by whole file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskhooks.errors import CorruptFileError, FormatError, ResumeError, StorageError
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.shards import MANIFEST, Shards
from maskhooks.sites.site import Site

MADE = {"explainer": {"name": "random", "sites": ["a:output"]}, "batch_size": 3}


def explanation(first: int, count: int = 3) -> Explanation:
    valid = torch.ones(count, 4, dtype=torch.bool)
    valid[0, 2:] = False
    sites = [Site.parse(f"{name}:output", "batch token hidden -> batch token") for name in "ba"]
    scores = [Scores(site, depth, torch.rand(count, 4), valid) for depth, site in enumerate(sites)]
    return Explanation.build(scores, provenance={"seed": 1}, metadata=[{"target": "t"}] * count, start_index=first)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    found = Shards.open(tmp_path / "rows", MADE)
    for number, count in enumerate((3, 3, 1)):
        found.write(number, explanation(3 * number, count))
    return found


def test_files_are_counted_and_gone_through(shards: Shards) -> None:
    assert (len(shards), shards.examples, shards.complete) == (3, 7, False)
    assert [shards.num_examples(number) for number in sorted(shards.existing())] == [3, 3, 1]
    shards.finish(3, 7)
    again = Shards(shards.folder)
    assert (again.settings, again.complete, again.examples) == (MADE, True, 7)
    assert repr(again).endswith("3 files, complete)")
    assert [sorted(part.metadata) for part in again] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_mean_kept_is_that_of_all_rows(shards: Shards) -> None:
    whole = Explanation.from_parquet(shards.folder)
    found = shards.mean_kept()
    assert list(found) == list(whole.mean_kept()) == [("b:output", 0), ("a:output", 1)]
    np.testing.assert_allclose(list(found.values()), list(whole.mean_kept().values()), rtol=1e-6)


def test_a_missing_file_is_not_complete(shards: Shards) -> None:
    shards.finish(3, 7)
    shards.path(1).unlink()
    assert not Shards(shards.folder).complete
    assert Shards(shards.folder).examples == 4


def test_it_is_gone_on_with_by_the_same_maker_only(shards: Shards) -> None:
    assert len(Shards.open(shards.folder, MADE)) == 3
    other = {"explainer": {"name": "random", "sites": ["b:output"]}, "batch_size": 4, "about": {}}
    with pytest.raises(ResumeError, match=r"was started with other settings: .*--overwrite") as caught:
        Shards.open(shards.folder, other)
    assert caught.value.differences == [
        'explainer.sites was ["a:output"] and is ["b:output"]',
        "batch_size was 3 and is 4",
        "about was null and is {}",
    ]
    assert len(Shards.open(shards.folder, other, overwrite=True)) == 0


def test_rows_of_unknown_origin_are_not_mixed_in(shards: Shards) -> None:
    (shards.folder / MANIFEST).unlink()
    with pytest.raises(ResumeError, match="unknown origin"):
        Shards.open(shards.folder, MADE)
    with pytest.raises(CorruptFileError, match=r"_manifest\.json cannot be read"):
        Shards(shards.folder)


def test_overwriting_leaves_what_is_not_ours(shards: Shards) -> None:
    (shards.folder / "notes.txt").write_text("mine")
    (shards.folder / ".part-000009.parquet-x.partial").write_bytes(b"half")
    Shards.open(shards.folder, MADE, overwrite=True)
    assert sorted(path.name for path in shards.folder.iterdir()) == [MANIFEST, "notes.txt"]


def test_a_single_file_in_the_folders_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    explanation(0).to_parquet(path)
    with pytest.raises(StorageError, match=r"cannot be created \(File exists\).*overwrite"):
        Shards.open(path, MADE)
    assert len(Shards.open(path, MADE, overwrite=True)) == 0
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="File exists"):
        Shards.open(tmp_path / "notes.txt", MADE, overwrite=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x80", json.dumps({"format": 2, "ended": None})])
def test_a_broken_manifest_is_named(shards: Shards, text: str) -> None:
    (shards.folder / MANIFEST).write_text(text)
    with pytest.raises(CorruptFileError, match=r"_manifest\.json is not a manifest of explain_to"):
        Shards.open(shards.folder, MADE)


def test_the_first_versions_folder_is_refused_by_its_format(shards: Shards) -> None:
    (shards.folder / MANIFEST).write_text(json.dumps({"format": 1, "made": {}, "ended": None}))
    with pytest.raises(FormatError, match=r"_manifest\.json has format 1, which maskhooks 0\.1\.0 wrote"):
        Shards.open(shards.folder, MADE)


def test_a_full_disk_leaves_whole_files(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in shards.folder.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        shards.write(3, explanation(7))
    monkeypatch.undo()
    assert caught.value.path == shards.path(3)
    assert "Complete files stay (files: 3), and the same call resumes after them." in str(caught.value)
    assert {path.name: path.read_bytes() for path in shards.folder.iterdir()} == before
    shards.write(3, explanation(7))
    assert shards.existing() == {0, 1, 2, 3}


def test_drafts_of_killed_processes_go_when_their_file_is_whole(shards: Shards) -> None:
    left = shards.folder / ".part-000003.parquet-x.partial"
    left.write_bytes(b"half")
    assert len(Explanation.from_parquet(shards.folder)) == 56
    shards.write(3, explanation(7))
    assert not left.exists()
