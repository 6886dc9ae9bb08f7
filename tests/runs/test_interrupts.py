"""Ctrl-C, SIGTERM, a full disk, NaN: a run that ends before its time leaves an explainer that can be used."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical

import maskhooks
from maskhooks import atomic_write
from maskhooks.errors import NonFiniteError, ResumeWarning, StorageError
from maskhooks.runs.interrupts import Interrupts, as_exception
from maskhooks.runs.run_log import RunLog
from maskhooks.runs.run_state import load_state
from tests import tiny_runs as runs
from tests.conftest import fingerprint
from tests.tiny_runs import elsewhere, results, train

pytestmark = pytest.mark.filterwarnings(
    "ignore::maskhooks.errors.MarginWarning", "ignore:.*multi-threaded.*fork.*:DeprecationWarning"
)


def at(step: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something while the row of a step is written."""
    write, done = RunLog.write, []

    def written(log: RunLog, name: str, row: dict[str, Any]) -> None:
        if name == "log" and row["step"] == step and not done:  # a step may have several rows
            done.append(act())
        write(log, name, row)

    monkeypatch.setattr(RunLog, "write", written)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


class TestSignals:
    @pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
    @pytest.mark.parametrize("step", [4, 14])
    def test_the_explainer_can_be_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[BaseException], step: int
    ) -> None:
        made = runs.explainer()
        made.hooked.model.train()
        before, handlers = fingerprint(made.hooked.model), [signal.getsignal(n) for n in (number, signal.SIGTERM)]
        batches, held = runs.loader(42, 8, shuffled=True), runs.loader(13, 4)
        fit = {"steps": 24, "run_dir": tmp_path, "progress": False, "accelerator": "cpu"}
        with monkeypatch.context() as patch:
            at(step, send(number), patch)
            with pytest.raises(kind) as caught:
                made.fit(batches, held, **fit)
        assert caught.value.args == ((143,) if kind is SystemExit else caught.value.args)
        if kind is KeyboardInterrupt:
            assert f"interrupted at step {step + 1} of 24" in str(caught.value)
            assert f"saved in {tmp_path}" in str(caught.value)
        assert fingerprint(made.hooked.model) == before
        assert [signal.getsignal(n) for n in (number, signal.SIGTERM)] == handlers
        assert made.result.stop_reason == f"interrupted at step {step + 1}"
        assert len(made.result.log) == step + 1
        assert bool(made.result.chosen_steps) == (step >= 6)  # the best of the validations so far, else the last state
        batch = next(iter(held))
        assert maskhooks.load(tmp_path, made.hooked).explain(batch) == made.explain(batch)
        made.fit(batches, held, resume=True, **fit)
        assert made.result.stop_reason == "all 24 steps were done"

        train(tmp_path / "whole")
        whole, again = results(tmp_path / "whole"), results(tmp_path)
        assert again["log.csv"] == whole["log.csv"]
        assert again["weights.safetensors"] == whole["weights.safetensors"]

    def test_without_a_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = runs.explainer()
        at(3, send(signal.SIGINT), monkeypatch)
        with pytest.raises(KeyboardInterrupt, match=r"the explainer can be used\.$"):
            made.fit(runs.loader(42, 8), steps=24, progress=False, accelerator="cpu")
        assert made.fitted

    def test_a_second_one_ends_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = runs.explainer()
        before = fingerprint(made.hooked.model)
        at(8, lambda: [send(signal.SIGINT)() for _ in range(2)], monkeypatch)
        with pytest.raises(KeyboardInterrupt, match="second time"):
            made.fit(runs.loader(42, 8), steps=24, run_dir=tmp_path, save_every=0.0, progress=False, accelerator="cpu")
        assert fingerprint(made.hooked.model) == before
        assert load_state(tmp_path / "state")["done"] == 8

    def test_before_the_first_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = runs.explainer()
        before = fingerprint(made.hooked.model)
        monkeypatch.setattr("maskhooks.training.preparation.closed_divergences", lambda *_: send(signal.SIGINT)())
        with pytest.raises(KeyboardInterrupt):
            made.fit(runs.loader(42, 8), steps=24, run_dir=tmp_path, progress=False, accelerator="cpu")
        assert fingerprint(made.hooked.model) == before
        assert not made.fitted

    def test_ignored_signals_stay_ignored(self) -> None:
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interrupts() as interrupts:
                assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                send(signal.SIGINT)()
            assert not interrupts.asked
        finally:
            signal.signal(signal.SIGINT, former)

    def test_another_thread_changes_nothing(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        found = []

        def inside() -> None:
            with Interrupts():
                found.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        assert found == [handler]

    def test_what_is_raised(self) -> None:
        assert isinstance(as_exception(signal.SIGINT, "now"), KeyboardInterrupt)
        assert as_exception(signal.SIGTERM, "now").args == (143,)


class TestFullDisk:
    def test_of_the_state(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train(tmp_path / "whole")
        fsync, made = os.fsync, runs.explainer()

        def full(number: int) -> None:
            if ".step-" in os.readlink(f"/proc/self/fd/{number}") and len(list((tmp_path / "run").rglob("step*"))) > 1:
                raise OSError(28, "No space left on device")
            fsync(number)

        fit = {"steps": 24, "run_dir": tmp_path / "run", "progress": False, "accelerator": "cpu"}
        batches, held = runs.loader(42, 8, shuffled=True), runs.loader(13, 4)
        with monkeypatch.context() as patch:
            patch.setattr(atomic_write.os, "fsync", full)
            with pytest.raises(StorageError, match=r"No space left.*stopped at step 12.*resume"):
                made.fit(batches, held, **fit)
        assert made.fitted
        assert made.result.stop_reason == "nothing could be written at step 12"
        assert load_state(tmp_path / "run" / "state")["done"] == 6
        made.fit(batches, held, resume=True, **fit)
        assert results(tmp_path / "run") == results(tmp_path / "whole")

    @pytest.mark.parametrize("room", [700, 2_000, 9_000])
    def test_files_that_may_not_grow(self, tmp_path: Path, room: int) -> None:
        """The system's own limit, met by the state or by the log."""

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            try:
                train(tmp_path / "run")
            except StorageError as error:
                os._exit(7 if "cannot be written" in str(error) else 8)

        with elsewhere(limited) as process:
            process.join(200)
        assert process.exitcode == 7
        with pytest.warns(ResumeWarning, match="holds nothing to resume"):
            train(tmp_path / "run", fit={"resume": True})
        train(tmp_path / "whole")
        assert results(tmp_path / "run") == results(tmp_path / "whole")

    def test_a_saved_explainer_is_not_spoilt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = train(tmp_path)
        before = results(tmp_path)

        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(atomic_write.os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            made.save(tmp_path)
        assert results(tmp_path) == before


def test_nan_leaves_the_best_state_so_far(tmp_path: Path) -> None:
    made = runs.explainer()
    count = [0]

    def output(logits: torch.Tensor) -> Categorical:
        count[0] += 1
        return Categorical(logits=logits * torch.nan if count[0] > 90 else logits, validate_args=False)

    made.hooked.task._output = output
    with pytest.raises(NonFiniteError, match=f"not finite at step .*It is saved in {tmp_path}"):
        made.fit(runs.loader(42, 8), runs.loader(13, 4), steps=24, run_dir=tmp_path, progress=False, accelerator="cpu")
    stopped = made.result.stop_reason
    assert stopped.startswith("not finite at step")
    assert made.result.chosen_steps
    again = maskhooks.load(tmp_path, made.hooked)
    assert again.result.stop_reason == stopped
    assert all(bool(tensor.isfinite().all()) for part in again.parts for tensor in part.state_dict().values())
