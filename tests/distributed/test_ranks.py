"""Several processes do what one does with the whole batch."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributions import Categorical

from maskhooks import DiffMask, Guan, Readout, Recipe
from maskhooks.distributed.ranks import Ranks, Shard, _Shared
from maskhooks.errors import BatchError, NonFiniteError, SettingError
from maskhooks.explainers.learned import Learned
from maskhooks.masks.gates import Bernoulli, HardConcrete
from maskhooks.runs.run_log import RunLog
from maskhooks.seeds import generator
from maskhooks.training.pace import Pace
from tests import tiny_runs as runs
from tests.tiny_runs import QUICK, results, train

pytestmark = pytest.mark.filterwarnings(
    "ignore::maskhooks.errors.MarginWarning", "ignore:.*multi-threaded.*fork.*:DeprecationWarning"
)
ROOT = Path(__file__).parents[2]
TWO = {"devices": 2, "strategy": "ddp_fork"}


def weights(explainer: Learned) -> Iterator[torch.Tensor]:
    for part in explainer.parts:
        yield from part.state_dict().values()


def same(one: Learned, other: Learned) -> None:
    """Equal up to the order in which floats are summed."""
    assert len(one.result.log) == len(other.result.log)
    for rows in ("log", "validation"):
        for mine, yours in zip(getattr(one.result, rows), getattr(other.result, rows), strict=True):
            assert mine == pytest.approx(yours, abs=1e-4)
    assert one.result.chosen_steps == other.result.chosen_steps
    for mine, yours in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-4, rtol=1e-4)
    assert one.within_margin == other.within_margin


def moving(explainer: DiffMask) -> bool:
    """Whether the multiplier is neither where it began nor at an end of its steps."""
    found = [row["multiplier"] for row in explainer.result.log]
    steps = {round(abs(b - a), 6) for a, b in itertools.pairwise(found)}
    return len(steps) > 5


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_are_one_with_the_global_batch(strategy: str) -> None:
    """42 examples: with batches of 4 the last of six rounds has one batch of 2, and none for the second process."""
    settings: dict[str, Any] = {"sites": runs.SITES[1], "margin": 0.05}
    one = runs.explainer(**settings)
    plain = {"steps": 30, "progress": False, "accelerator": "cpu", "cache": None}
    one.fit(runs.loader(42, 8), runs.loader(13, 4), **plain)
    two = runs.explainer(**settings)
    two.fit(runs.loader(42, 4), runs.loader(13, 4), **plain, devices=2, strategy=strategy)
    assert moving(one)
    same(one, two)


@pytest.mark.parametrize(
    "settings",
    [
        {"sites": runs.SITES[0], "conditioned_on": runs.SITES},
        {"gate": "bernoulli"},
        {"recipe": dataclasses.replace(QUICK, objective="paper")},
        {"sites": runs.SITES[1], "recipe": dataclasses.replace(QUICK, validations=1)},  # several draws
        {"margin": 5e-4, "recipe": dataclasses.replace(QUICK, calibrations=3)},
    ],
)
def test_other_settings(settings: dict[str, Any]) -> None:
    one, two = runs.explainer(**settings), runs.explainer(**settings)
    plain = {"epochs": 2, "progress": False, "accelerator": "cpu", "cache": None}
    one.fit(runs.loader(42, 8), runs.loader(13, 4), **plain)
    two.fit(runs.loader(42, 4), runs.loader(13, 4), **plain, **TWO)
    assert len(two.result.log) == 12
    same(one, two)


@pytest.mark.parametrize(("kind", "settings"), [(Readout, {"beta": 1.0}), (Guan, {"amortized": True})])
def test_noise_is_that_of_the_global_batch(kind: type[Learned], settings: dict[str, Any]) -> None:
    found = []
    for size, devices in ((8, {}), (4, TWO)):
        recipe = dataclasses.replace(Recipe.named(kind.name), statistics_batches=1, validations=2)
        made = kind(runs.explainer().hooked, runs.SITES[1], recipe=recipe, **settings)
        plain = {"steps": 12, "progress": False, "accelerator": "cpu", "cache": None}
        made.fit(runs.loader(42, size), runs.loader(13, 4), **plain, **devices)
        found.append(made)
    same(*found)
    assert len({row["divergence"] for row in found[0].result.log}) == 12


def test_a_list_of_batches_with_stored_passes(tmp_path: Path) -> None:
    found = []
    for devices in ({}, TWO):
        made = runs.explainer()
        batches = list(runs.loader(42, 4 if devices else 8))
        made.fit(batches, epochs=1, progress=False, accelerator="cpu", cache=tmp_path / "cache", **devices)
        found.append(made)
    same(*found)
    made.fit(batches, epochs=3, progress=False, accelerator="cpu", cache="memory", **TWO)
    assert len(made.result.log) == 18


def test_the_files_of_a_run_and_its_resume(tmp_path: Path) -> None:
    two = train(tmp_path / "two", fit=TWO)
    rows = (tmp_path / "two" / "log.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(24))
    for path in (tmp_path / "two" / "state").iterdir():
        if "24" in path.name:
            path.unlink()
    again = train(tmp_path / "two", fit={**TWO, "resume": True})
    same(two, again)
    assert (tmp_path / "two" / "log.csv").read_text().splitlines() == rows


def test_ctrl_c_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that called fit is told alone, as a notebook's is, and tells the others."""
    done = train(tmp_path / "whole", fit=TWO)
    write, told = RunLog.write, []

    def written(log: RunLog, name: str, row: dict[str, Any]) -> None:
        write(log, name, row)
        if log.folder is not None and row["step"] == 7 and not told:  # in the first process, once
            told.append(os.kill(os.getppid(), signal.SIGINT))
            time.sleep(3)  # until it has come back

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", written)
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 8 of 24"):
            train(tmp_path / "cut", fit=TWO)
    same(train(tmp_path / "cut", fit={**TWO, "resume": True}), done)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def nan_after(calls: int) -> Any:
    """Outputs that are NaN in one process alone, after some calls."""
    count = [0]

    def output(logits: torch.Tensor) -> Categorical:
        count[0] += os.environ.get("LOCAL_RANK") == "1"
        return Categorical(logits=logits * torch.nan if count[0] > calls else logits, validate_args=False)

    return output


def test_nan_on_one_of_them_ends_all(tmp_path: Path) -> None:
    made = runs.explainer()
    made.hooked.task._output = nan_after(40)
    with pytest.raises(NonFiniteError, match=f"loss is not finite at step .*saved in {tmp_path}"):
        made.fit(runs.loader(42, 4), steps=40, progress=False, accelerator="cpu", run_dir=tmp_path, **TWO)
    assert made.fitted
    assert all(bool(tensor.isfinite().all()) for tensor in weights(made))
    assert len(made.result.log) < 40


def test_the_clock_of_the_first_process_decides_how_often_gates_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {0: 40, 1: 400}
    monkeypatch.setattr(Pace, "planned", lambda pace, done: steps[dist.get_rank()])
    made = runs.explainer().fit(
        runs.loader(8, 4), runs.loader(8, 4), steps=10, progress=False, accelerator="cpu", **TWO
    )
    assert made.result.validation


def test_errors_come_back_by_name() -> None:
    made = runs.explainer()
    batches = [*runs.loader(8, 4), {"a batch": "of another kind"}]
    with pytest.raises(BatchError):
        made.fit(batches, steps=5, progress=False, accelerator="cpu", **TWO)


def test_what_cannot_be_sent_is_named() -> None:
    made = runs.explainer()
    made.divergence = lambda one, other: (one.probs - other.probs).abs().sum(-1)
    with pytest.raises(SettingError, match="ddp_fork"):
        made.fit(runs.loader(8, 4), steps=2, progress=False, accelerator="cpu", devices=2, strategy="ddp_spawn")


SCRIPT = """
    import sys, warnings
    import torch.distributed as dist
    from tests import tiny_runs as runs

    warnings.simplefilter("ignore")
    made = runs.explainer()
    made.fit(runs.loader(42, 4), runs.loader(13, 4), steps=12, progress=False, accelerator="cpu", devices=2,
             strategy="ddp", run_dir=sys.argv[1])
    print(dist.get_rank(), len(made.result.log), made.within_margin, made.result.chosen_steps)
"""


@pytest.mark.parametrize("start", [[], ["-m", "torch.distributed.run", "--nproc-per-node=2"]])
def test_a_script_in_two_processes(tmp_path: Path, start: list[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    found = subprocess.run(
        [sys.executable, *start, str(script), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "adapters"))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    lines = sorted(line for line in found.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert [line[0] for line in lines] == ["0", "1"]
    assert lines[0][1:] == lines[1][1:]
    one = runs.explainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.fit(
            runs.loader(42, 8),
            runs.loader(13, 4),
            steps=12,
            progress=False,
            accelerator="cpu",
            run_dir=tmp_path / "one",
            cache=None,
        )
    assert lines[0].endswith(f"12 {one.within_margin} {one.result.chosen_steps}")
    import maskhooks

    same_weights = zip(weights(maskhooks.load(tmp_path / "two", one.hooked)), weights(one), strict=True)
    for mine, yours in same_weights:
        torch.testing.assert_close(mine, yours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", [HardConcrete(), Bernoulli()])
def test_ranks_sample_their_rows_of_the_global_batch(gate: Any) -> None:
    logits = torch.randn(5, 4, 2)
    whole = gate.sample(logits, generator(3))
    first = _Shared(gate, Shard(0, (5, 4, 2))).sample(logits[:2, :3], generator(3))
    second = _Shared(gate, Shard(2, (5, 4, 2))).sample(logits[2:], generator(3))
    assert torch.equal(first, whole[:2, :3])
    assert torch.equal(second, whole[2:])


def test_alone_everything_is_as_it_is() -> None:
    ranks = Ranks()
    assert ranks.is_first
    assert (ranks.largest(3), ranks.all_gather("x"), ranks.broadcast("y")) == (3, ["x"], "y")
    weight = torch.nn.Parameter(torch.ones(2))
    ranks.add_gradients([weight])
    assert weight.grad is None
