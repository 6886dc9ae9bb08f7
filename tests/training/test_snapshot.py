"""A run that was killed goes on to the numbers of one that was not."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from maskhooks import Recipe, atomic_write
from maskhooks.errors import ResumeError, ResumeWarning, SettingError
from maskhooks.runs.run_log import RunLog
from maskhooks.runs.run_state import load_state
from tests import tiny_runs as runs
from tests.tiny_runs import QUICK, SITES, elsewhere, results, train

pytestmark = pytest.mark.filterwarnings(
    "ignore::maskhooks.errors.MarginWarning", "ignore:.*multi-threaded.*fork.*:DeprecationWarning"
)
RESUME = {"resume": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(folder)
    return results(folder)


def resumed(folder: Path, **settings: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResumeWarning)  # killed before the first state, it begins at the start
        train(folder, fit={**RESUME, **settings.pop("fit", {})}, **settings)


def killed_at(step: int, folder: Path, **settings: Any) -> None:
    """A run that is killed while it writes the row of a step."""
    write = RunLog.write

    def deadly(log: RunLog, name: str, row: dict[str, Any]) -> None:
        write(log, name, row)
        if name == "log" and row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        RunLog.write = deadly  # type: ignore[method-assign] # in a process of its own
        resumed(folder, **settings)

    with elsewhere(run) as process:
        process.join(200)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    began = time.monotonic()
    train(tmp_path / "timed")
    longest = 0.3 * (time.monotonic() - began)  # so that one try cannot make it
    moments, kills, folder = random.Random(seed), 0, tmp_path / "killed"
    for _ in range(80):
        longest *= 1.05
        with elsewhere(lambda: resumed(folder)) as process:
            process.join(moments.uniform(0.0, longest))
            if process.is_alive():
                process.kill()
                process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    assert kills > 1
    assert process.exitcode == 0
    assert results(folder) == whole


@pytest.mark.parametrize("write", [1, 2, 3, 11, 12])
@pytest.mark.parametrize("stage", ["before the file is whole", "before it has its name", "after it"])
def test_killed_while_the_state_is_written(tmp_path: Path, whole: dict[str, bytes], write: int, stage: str) -> None:
    def run() -> None:
        count, replace, fsync = [0], Path.replace, os.fsync

        def die(when: str) -> None:
            if count[0] == write and when == stage:
                os.kill(os.getpid(), signal.SIGKILL)

        def deadly_fsync(number: int) -> None:
            die("before the file is whole")
            fsync(number)

        def deadly_replace(path: Path, target: Path) -> Path:
            die("before it has its name")
            found = replace(path, target)
            die("after it")
            count[0] += 1
            return found

        count[0] = 1
        Path.replace = deadly_replace  # type: ignore[assignment, method-assign]
        atomic_write.os.fsync = deadly_fsync  # type: ignore[assignment]
        resumed(tmp_path)

    with elsewhere(run) as process:
        process.join(200)
    assert process.exitcode == -signal.SIGKILL
    resumed(tmp_path)
    assert results(tmp_path) == whole
    assert not list((tmp_path / "state").glob(".*"))


SETTINGS: dict[str, dict[str, Any]] = {
    "input given states": {"sites": SITES[0], "conditioned_on": SITES},
    "the paper's recipe": {
        "recipe": dataclasses.replace(Recipe.named("paper"), warmup_steps=2, validations=4, statistics_batches=3),
    },
    "early stop": {"recipe": dataclasses.replace(QUICK, patience=2, validations=12, learning_rate=1e-12)},
    "stored passes": {"fit": {"cache": "memory"}},
    "bfloat16": {"fit": {"precision": "bf16-mixed"}},
    "epochs": {"fit": {"steps": None, "epochs": 4}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_run_goes_on(tmp_path: Path, name: str) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    train(folders[0], **SETTINGS[name])
    for step in (2, 4, 5):
        killed_at(step, folders[1], **SETTINGS[name])
    resumed(folders[1], **SETTINGS[name])
    assert results(folders[1]) == results(folders[0])


def test_a_small_set_has_its_draws_again(tmp_path: Path) -> None:
    settings = {"sites": SITES[1], "recipe": dataclasses.replace(QUICK, validations=2)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, **settings)
    killed_at(14, killed, **settings)
    assert load_state(killed / "state")["draws"] == 3  # 4 batches, in 12 steps between two validations
    resumed(killed, **settings)
    assert results(killed) == results(whole)


def test_states_at_validations_alone(tmp_path: Path, whole: dict[str, bytes]) -> None:
    killed_at(16, tmp_path, fit={"save_every": 1e9})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "step-000000006.safetensors",
        "step-000000012.safetensors",
    ]
    resumed(tmp_path)
    assert results(tmp_path) == whole


def test_a_finished_run_is_returned(tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    one = train(tmp_path)
    monkeypatch.setattr(RunLog, "write", lambda *_: pytest.fail("it trains"))
    again = train(tmp_path, fit=RESUME)
    assert results(tmp_path) == whole
    assert again.result == one.result
    batch = next(iter(runs.loader(8, 8)))
    assert again.explain(batch) == one.explain(batch)


def test_nothing_to_go_on_from(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.warns(ResumeWarning, match="holds nothing to resume"):
        train(tmp_path, fit=RESUME)
    assert results(tmp_path) == whole


def test_a_new_run_forgets_the_old_one(tmp_path: Path, whole: dict[str, bytes]) -> None:
    train(tmp_path, seed=7)
    assert results(tmp_path) != whole
    killed_at(8, tmp_path / "other", seed=7)
    train(tmp_path / "other")
    assert results(tmp_path / "other") == whole


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"margin": 0.4}, "margin was 0.5 and is 0.4"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"recipe": dataclasses.replace(QUICK, warmup_steps=6)}, "recipe.warmup_steps was 5 and is 6"),
        ({"fit": {"steps": 30}}, "steps was 24 and is 30"),
        ({"size": 7}, None),
        ({"size": 21}, "training batches was 6 and is 2"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changed: dict[str, Any], difference: str | None) -> None:
    killed_at(8, tmp_path)
    before = results(tmp_path)
    with pytest.raises(ResumeError) as caught:
        resumed(tmp_path, **changed)
    assert caught.value.differences == [difference or "the batches"]
    assert results(tmp_path) == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    killed_at(8, tmp_path)
    made = runs.explainer()
    made.hooked.model.head.weight.data += 1
    with pytest.raises(ResumeError, match=r"model was .* and is "):
        made.fit(runs.loader(42, 8), runs.loader(13, 4), steps=24, run_dir=tmp_path, resume=True, progress=False)


def test_an_order_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    """Batches in an order that changes from run to run cannot be gone on with."""

    class Turned(list[Any]):
        def __iter__(self) -> Any:
            self.append(self.pop(0))
            return super().__iter__()

    batches = Turned((ids, torch.ones(8, 6, dtype=torch.bool)) for ids in torch.randint(0, 11, (6, 8, 6)).unbind())
    fit = {"steps": 5, "run_dir": tmp_path, "progress": False, "accelerator": "cpu", "save_every": 0.0}
    runs.explainer().fit(batches, **fit)
    (tmp_path / "state" / "step-000000005.safetensors").unlink()
    with pytest.raises(ResumeError, match="batch 3 of epoch 0 differs"):
        runs.explainer().fit(batches, resume=True, **fit)


def test_resume_needs_a_folder() -> None:
    with pytest.raises(SettingError, match="run_dir"):
        train(None, fit=RESUME)


def test_the_loaders_generator_is_left_as_it_was(tmp_path: Path) -> None:
    batches = runs.loader(42, 8, shuffled=True)
    before = batches.generator.get_state()  # type: ignore[union-attr]
    runs.explainer().fit(batches, steps=8, progress=False, accelerator="cpu")
    assert torch.equal(batches.generator.get_state(), before)  # type: ignore[union-attr]
