"""`Explainer.explain_to`: rows of any amount of data, the same however often it was ended and however it is shared."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader

import maskhooks
from maskhooks.errors import BatchError, EmptyLoaderError, NotFittedError, ResumeError, SettingError, StorageError
from maskhooks.explainers.base import Explainer
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.shards import Shards


class Network(nn.Module):
    """Two classes from the mean of token states; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        valid = (tokens != 0).float()[..., None]
        return self.head((torch.tanh(self.layer(self.embed(tokens))) * valid).sum(1) / valid.sum(1))


def hooked() -> maskhooks.Hooked:
    torch.manual_seed(0)
    pattern = "batch token hidden -> batch token"
    return maskhooks.wrap(
        Network(),
        sites={"embed:output": pattern, "layer:output": pattern},
        output=lambda logits: Categorical(logits=logits),
        valid=lambda batch: batch != 0,
        names=lambda batch: [[f"<{token}>" for token in row] for row in batch.tolist()],
    )


def texts(count: int) -> list[list[int]]:
    """Examples of 1 to 6 tokens."""
    generator = np.random.default_rng(count)
    return [generator.integers(1, 10, generator.integers(1, 7)).tolist() for _ in range(count)]


def collate(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


SETTINGS: dict[str, Any] = {"collate": collate, "batch_size": 4, "batches": 2, "progress": False}


def random_explainer() -> Explainer:
    return maskhooks.Random(hooked(), ["embed:output", "layer:output"])


def diffmask() -> Explainer:
    found = maskhooks.DiffMask(hooked(), "layer:output", recipe=maskhooks.Recipe(statistics_batches=1))
    return found.fit([collate(texts(8))], steps=2, progress=False, accelerator="cpu")


MAKERS = pytest.mark.parametrize("make", [random_explainer, diffmask])


def contents(shards: Shards) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards.folder.iterdir()}


@MAKERS
def test_rows_are_those_of_explain_all(make: Callable[[], Explainer], tmp_path: Path, unchanged: Any) -> None:
    explainer, data = make(), texts(22)
    unchanged(explainer.hooked.model)
    shards = explainer.explain_to(iter(data), tmp_path / "rows", **SETTINGS)
    assert (len(shards), shards.complete, shards.examples) == (3, True, 22)
    whole = explainer.explain_all([collate(data[start : start + 4]) for start in range(0, 22, 4)])
    again = Explanation.from_parquet(shards.folder)
    assert again.metadata == whole.metadata
    assert again.provenance == whole.provenance
    assert len(again) == len(whole)
    for number in range(22):
        assert again.select(example=number, valid=None) == whole.select(example=number, valid=None)


def test_examples_of_like_length_share_batches_and_keep_their_numbers(tmp_path: Path) -> None:
    explainer, data = diffmask(), texts(50)
    apart = explainer.explain_to(data, tmp_path / "apart", **SETTINGS)
    shards = explainer.explain_to(data, tmp_path / "sorted", length=len, **SETTINGS)
    found, plain = Explanation.from_parquet(shards.folder), Explanation.from_parquet(apart.folder)
    assert len(found) < len(plain)  # less padding
    assert found["example"].tolist() == sorted(found["example"].tolist())
    for number, text in enumerate(data):
        one = found.select(example=number)
        assert one["label"].tolist() == [f"<{token}>" for token in text]
        np.testing.assert_allclose(one["score"], plain.select(example=number)["score"], rtol=1e-5)
        assert found.metadata[number] == plain.metadata[number]


class Stopped(RuntimeError):  # noqa: N818 # reads better
    pass


@MAKERS
@pytest.mark.parametrize("length", [None, len])
def test_ended_anywhere_it_goes_on_to_the_same_files(
    make: Callable[[], Explainer], tmp_path: Path, length: Any
) -> None:
    explainer, data = make(), texts(45)
    whole = explainer.explain_to(data, tmp_path / "whole", length=length, **SETTINGS)
    made: list[int] = []

    def until(stop: int) -> Callable[[list[list[int]]], Tensor]:
        def counted(rows: list[list[int]]) -> Tensor:
            made.append(len(rows))
            if len(made) == stop:
                raise Stopped
            return collate(rows)

        return counted

    for stop in (1, 2, 3, 7, 3):
        made.clear()
        with pytest.raises(Stopped):
            make().explain_to(data, tmp_path / "rows", length=length, **{**SETTINGS, "collate": until(stop)})
    made.clear()
    shards = make().explain_to(data, tmp_path / "rows", length=length, **{**SETTINGS, "collate": until(0)})
    assert sum(made) < 45 - 8  # what was there is not made again
    assert contents(shards) == contents(whole)
    made.clear()
    make().explain_to(data, tmp_path / "rows", length=length, **{**SETTINGS, "collate": until(1)})
    assert not made  # nothing is left to do


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("batched", [False, True])
def test_parts_give_the_files_of_one_call(tmp_path: Path, order: tuple[int, ...], batched: bool) -> None:
    explainer, data = random_explainer(), texts(61)
    settings: dict[str, Any] = {**SETTINGS, "length": len}
    if batched:
        data, settings = [collate(data[i : i + 5]) for i in range(0, 61, 5)], {"batches": 2, "progress": False}  # type: ignore[misc]
    whole = explainer.explain_to(data, tmp_path / "whole", **settings)
    for done, which in enumerate(order):
        shards = explainer.explain_to(data, tmp_path / "rows", shard=(which, 3), **settings)
        assert shards.complete == (done == 2)
    assert contents(shards) == contents(whole)


def test_batches_that_count_otherwise_than_by_their_first_axis(tmp_path: Path) -> None:
    explainer = maskhooks.Random(
        maskhooks.wrap(
            nn.Linear(3, 2),
            sites={":output": "batch feature -> batch feature"},
            output=lambda logits: Categorical(logits=logits),
            call=lambda model, batch: model(batch[0][:2]),
        ),
        ":output",
    )
    batches = [(torch.randn(4, 3),)] * 3
    assert explainer.explain_to(batches, tmp_path / "one", progress=False).examples == 6
    with pytest.raises(BatchError, match="batches with 12 examples, by the first axis of their first tensor, gave 6"):
        explainer.explain_to(batches, tmp_path / "two", progress=False, shard=(0, 2))


def test_a_shuffling_loader_keeps_its_order(tmp_path: Path) -> None:
    data = torch.randint(1, 10, (40, 5))
    loader: Any = DataLoader(data, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    explainer = random_explainer()
    whole = explainer.explain_to(loader, tmp_path / "whole", batches=2, progress=False)
    assert whole.examples == 40
    torch.manual_seed(5)
    shards = explainer.explain_to(loader, tmp_path / "rows", batches=2, progress=False)
    shards.path(3).unlink()
    torch.manual_seed(6)
    explainer.explain_to(loader, tmp_path / "rows", batches=2, progress=False)
    assert contents(shards) == contents(whole)


def test_it_is_not_gone_on_with_by_another(tmp_path: Path) -> None:
    data, first = texts(10), diffmask()
    first.explain_to(data, tmp_path, metadata={"data": "a"}, **SETTINGS)

    def differences(explainer: Explainer, **given: Any) -> str:
        with pytest.raises(ResumeError) as caught:
            explainer.explain_to(data, tmp_path, **{**SETTINGS, "metadata": {"data": "a"}, **given})
        return "; ".join(caught.value.differences)

    assert "batch_size was 4 and is 5" in differences(first, batch_size=5)
    assert "batches was 2 and is 3" in differences(first, batches=3)
    assert "by_length was false and is true" in differences(first, length=len)
    assert 'metadata.data was "a" and is "b"' in differences(first, metadata={"data": "b"})
    assert "explainer.explainer" in differences(random_explainer())
    further = maskhooks.DiffMask(hooked(), "layer:output", recipe=maskhooks.Recipe(statistics_batches=1))
    further.fit([collate(texts(8))], steps=3, progress=False, accelerator="cpu")
    assert differences(further).startswith("weights was")
    other = diffmask()
    other.hooked.model.head.weight.data += 1
    assert "explainer.fingerprint" in differences(other)
    other.explain_to(data, tmp_path, overwrite=True, **SETTINGS)


def test_other_data_are_noticed_by_their_number(tmp_path: Path) -> None:
    explainer = random_explainer()
    shards = explainer.explain_to(texts(20), tmp_path, **SETTINGS)
    shards.path(0).unlink()
    with pytest.raises(ResumeError, match=r"part-000002\.parquet holds 4 examples, but the data now give 3"):
        explainer.explain_to(texts(19), tmp_path, **SETTINGS)


def test_what_cannot_be_done_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmptyLoaderError, match="nothing to explain"):
        random_explainer().explain_to([], tmp_path / "rows", **SETTINGS)
    with pytest.raises(NotFittedError):
        maskhooks.DiffMask(hooked(), "layer:output").explain_to(texts(4), tmp_path / "none", **SETTINGS)
    with pytest.raises(SettingError, match="no shard 4 of 4"):
        random_explainer().explain_to(texts(4), tmp_path / "none", shard=(4, 4), **SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file cannot be created"):
        random_explainer().explain_to(texts(4), tmp_path / "file", **SETTINGS)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("early_progress")
def test_progress_counts_what_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[int] = []
    shards = random_explainer().explain_to(texts(22), tmp_path, **{**SETTINGS, "progress": counts.append})
    assert counts == [4, 4, 4, 4, 4, 2]
    shards.path(1).unlink()
    random_explainer().explain_to(texts(22), tmp_path, total=22, **{**SETTINGS, "progress": True})
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("explaining: 18 of 22 (81 %), ")
    assert last.startswith("explaining: 22 of 22, ")


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    explainer = random_explainer()

    def peak(count: int) -> int:
        def data() -> Iterator[list[int]]:
            for _ in range(count):
                yield [1, 2, 3, 4, 5, 6] * 10

        tracemalloc.start()
        try:
            shards = explainer.explain_to(data(), tmp_path / str(count), **{**SETTINGS, "batch_size": 16})
            shards.mean_kept()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(32)
    assert peak(32 * 20) < 1.3 * peak(32 * 4)


KILLED = """
import json, os, pathlib, random, signal, sys, time
import torch
from tests.explainers.test_explain_to import SETTINGS, diffmask, texts

torch.set_num_threads(1)
folder, data, moments = pathlib.Path(sys.argv[1]), texts(1200), random.Random(int(sys.argv[2]))
explainer = diffmask()
begun = time.perf_counter()
explainer.explain_to(data, folder / "whole", length=len, **SETTINGS)
seconds = time.perf_counter() - begun
files = []
while len(files) < 12:
    process = os.fork()
    if not process:
        explainer.explain_to(data, folder / "rows", length=len, **SETTINGS)
        os._exit(0)
    time.sleep(moments.uniform(0, seconds / 8))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    files.append(len(list((folder / "rows").glob("*.parquet"))) if os.WIFSIGNALED(status) else -1)
shards = explainer.explain_to(data, folder / "rows", length=len, **SETTINGS)
print(json.dumps({"files": files, "complete": shards.complete}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and SIGKILL")
def test_killed_at_random_moments_no_row_is_lost_or_doubled(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), "0"]
    root = Path(__file__).parents[2]
    ran = subprocess.run(words, check=True, capture_output=True, text=True, cwd=root)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["complete"]
    assert len({number for number in found["files"] if number >= 0}) > 3  # they met it at work
    whole, rows = Shards(tmp_path / "whole"), Shards(tmp_path / "rows")
    assert {name for name in contents(rows) if not name.endswith(".partial")} == set(contents(whole))
    for name, content in contents(whole).items():
        assert (rows.folder / name).read_bytes() == content
    keys = Explanation.from_parquet(rows.folder).to_pandas()[["example", "site", "depth", "position"]]
    assert not keys.duplicated().any()
    assert sorted(set(keys["example"])) == list(range(1200))


FULL = """
import resource, signal, sys
from maskhooks.errors import StorageError
from tests.explainers.test_explain_to import SETTINGS, random_explainer, texts

shards = random_explainer().explain_to(texts(16), sys.argv[1], **SETTINGS)
shards.path(1).unlink()
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    random_explainer().explain_to(texts(16), sys.argv[1], **SETTINGS)
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of file sizes")
def test_a_file_that_cannot_grow_leaves_the_others(tmp_path: Path) -> None:
    """The system refuses to write, in a process of its own."""
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", FULL, str(tmp_path)]
    ran = subprocess.run(words, check=True, capture_output=True, text=True, cwd=root)
    assert "part-000001.parquet cannot be written (File too large)" in ran.stdout
    assert "Complete files stay (files: 1)" in ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_manifest.json", "part-000000.parquet"]
    assert random_explainer().explain_to(texts(16), tmp_path, **SETTINGS).complete
