"""`maskhooks explain` on much data: killed, stopped, shared by processes, and on a disk that is full."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import maskhooks
from maskhooks.cli.workers import devices_of
from maskhooks.errors import SettingError
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.shards import MANIFEST, Shards
from maskhooks.model.source import Factory

Run = Callable[..., Result]

FAULTS = '''

def with_faults():
    """As of_texts; slow, or with a text that kills the process or is an error, where the environment says so."""
    import os
    import signal
    import time

    from maskhooks.errors import BatchError
    from maskhooks.model.source import Opened

    opened = of_texts()

    def batch(records):
        fault = os.environ.get("FAULT") if any("9" in record.text for record in records) else None
        if os.environ.get("FAULT") == "slow":
            time.sleep(0.02)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "ours":
            raise BatchError("no batch can be made of 9")
        if fault == "other":
            raise ZeroDivisionError("of 9")
        return opened.batch(records)

    return Opened(opened.hooked, batch=batch)
'''


@pytest.fixture
def texts(tmp_path: Path, network: str) -> Path:
    """A thousand texts, of which one has the word 9; masks in `run`, quickly learned."""
    source = tmp_path / f"{network}.py"
    source.write_text(source.read_text() + FAULTS)
    draws = random.Random(0)
    lines = [" ".join(str(draws.randint(1, 8)) for _ in range(draws.randint(1, 6))) for _ in range(1000)]
    lines[700] = "9 1"
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "\n".join(lines) + "\n")
    hooked = Factory().open(f"{network}:of_texts").hooked
    explainer = maskhooks.DiffMask(hooked, "layer:output", recipe=maskhooks.Recipe(statistics_batches=1))
    explainer.fit([(torch.randint(1, 9, (4, 5)),)], steps=2, progress=False, accelerator="cpu")
    explainer.save(tmp_path / "run")
    return path


def command(out: str, *words: str, factory: str = "of_texts") -> list[str]:
    """Its files have 128 examples each, so there are 8."""
    given = ["explain", "run", f"tiny_network:{factory}", "--data", "texts.csv", "--out", out, "--batch-size", "4"]
    return [*given, "--max-examples", "2", "--plots", "1", "--device", "cpu", *words]


@pytest.fixture
def whole(run: Run, texts: Path, tmp_path: Path) -> dict[str, bytes]:
    """What is written by a command that nothing stops."""
    result = run(*command("whole"))
    assert result.exit_code == 0, result.stderr
    assert "over 1000 examples" in result.stdout
    found = rows(tmp_path / "whole")
    assert len(found) == 9
    return found


def rows(out: Path) -> dict[str, bytes]:
    folder = out / "explanation.parquet"
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".partial")}


def started(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "maskhooks", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def begun(process: subprocess.Popen[str], path: Path) -> bool:
    """Waits for a file, or for the process's end."""
    while process.poll() is None and not path.exists():
        time.sleep(0.005)
    return process.poll() is None


def test_killed_and_gone_on_with(whole: dict[str, bytes], tmp_path: Path) -> None:
    moments, seen = random.Random(0), []
    for number in range(4):
        process = started(command("out"))
        begun(process, tmp_path / "out" / "explanation.parquet" / f"part-{2 * number:06d}.parquet")
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        seen.append(process.returncode)
    assert -signal.SIGKILL in seen
    process = started(command("out"))
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "over 1000 examples" in out
    assert rows(tmp_path / "out") == whole
    assert (tmp_path / "out" / "explanation.html").read_bytes() == (
        tmp_path / "whole" / "explanation.html"
    ).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize("devices", [[], ["--devices", "2"]])
def test_ctrl_c_says_how_to_go_on(
    run: Run, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str]
) -> None:
    monkeypatch.setenv("FAULT", "slow")
    words = command("out", "--limit", "400", factory="with_faults")
    process = started([*words, *devices])
    assert begun(process, tmp_path / "out" / "explanation.parquet" / "part-000000.parquet")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert re.search(r"stopped: out/explanation\.parquet holds [1-9] complete files with \d+ examples\.", error)
    assert "Run the same command again to resume." in error
    assert "Traceback" not in error
    monkeypatch.delenv("FAULT")
    again = run(*words)
    assert again.exit_code == 0
    assert "over 400 examples" in again.stdout


@pytest.mark.usefixtures("early_progress")
def test_two_processes_write_what_one_writes(whole: dict[str, bytes], run: Run, tmp_path: Path) -> None:
    result = run(*command("out", "--devices", "2"))
    assert result.exit_code == 0, result.stderr
    assert "over 1000 examples" in result.stdout
    assert "explaining: 1,000 of 1,000, " in result.stderr
    assert rows(tmp_path / "out") == whole


def test_parts_make_the_page_when_all_are_done(whole: dict[str, bytes], run: Run, tmp_path: Path) -> None:
    first = run(*command("out", "--shard", "1/2"))
    assert first.exit_code == 0, first.stderr
    assert "Shard 1/2 is done. The last shard to finish writes the page." in first.stdout
    assert "4 complete files with 488 examples" in first.stdout
    assert not (tmp_path / "out" / "explanation.html").exists()
    second = run(*command("out", "--shard", "0/2"))
    assert "over 1000 examples" in second.stdout
    assert (tmp_path / "out" / "explanation.html").exists()
    assert rows(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", r"error: cpu: the process was killed \(SIGKILL\)\. Was there enough memory\?"),
        ("ours", "error: cpu: no batch can be made of 9"),
        ("other", "error: cpu: Traceback .*ZeroDivisionError: of 9"),
    ],
)
def test_a_process_that_dies_is_reported_and_the_others_go_on(
    whole: dict[str, bytes], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("FAULT", fault)
    words = command("out", "--devices", "2", factory="with_faults")
    result = run(*words)
    assert result.exit_code == 2
    assert len(re.findall(message, result.stderr)) == 1
    assert "a process failed, of 2. Complete files are kept; run the same command again" in result.stderr
    assert sorted(Shards(tmp_path / "out" / "explanation.parquet").existing()) == [
        0,
        1,
        2,
        3,
        4,
        6,
    ]  # text 700 is in file 5
    monkeypatch.delenv("FAULT")
    assert run(*words).exit_code == 0
    same = [name for name in whole if name != MANIFEST]  # another factory, another name
    assert [rows(tmp_path / "out")[name] for name in same] == [whole[name] for name in same]


def test_the_same_error_of_all_processes_is_told_once(run: Run, texts: Path, tmp_path: Path) -> None:
    words = command("out", "--devices", "2")
    words[words.index("run")] = "nowhere"
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.count("is neither the folder of a run") == 1


def test_other_settings_are_refused(run: Run, texts: Path, tmp_path: Path) -> None:
    def explained(*words: str) -> Result:
        return run(*command("out", *words))

    assert explained("--limit", "200").exit_code == 0
    again = explained("--limit", "200")
    assert (again.exit_code, "over 200 examples" in again.stdout) == (0, True)
    for words, difference in (
        (["--limit", "300"], "metadata.data.limit was 200 and is 300"),
        (["--limit", "200", "--max-length", "5"], "metadata.max_length was 128 and is 5"),
        (["--limit", "200", "--batch-size", "8"], "batch_size was 4 and is 8"),
    ):
        result = explained(*words)
        assert result.exit_code == 2
        assert difference in result.stderr
        assert "--overwrite" in result.stderr
    texts.write_text(texts.read_text() + "1 2\n")
    assert "metadata.data.bytes was" in explained("--limit", "200").stderr
    assert explained("--limit", "300", "--overwrite").exit_code == 0
    assert Shards(tmp_path / "out" / "explanation.parquet").examples == 300
    assert run(*command("out", "--limit", "200", "--overwrite", "--devices", "2")).exit_code == 0
    found = Explanation.from_parquet(tmp_path / "out" / "explanation.parquet")
    assert sorted(set(found["example"].tolist())) == list(range(200))


LIMITED = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from maskhooks.cli import main; main()"
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of file sizes")
def test_a_full_disk_names_the_file(whole: dict[str, bytes], run: Run, tmp_path: Path) -> None:
    assert run(*command("out", "--shard", "0/2")).exit_code == 0
    words = [sys.executable, "-c", LIMITED, *command("out")]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "out/explanation.parquet/part-000001.parquet cannot be written (File too large)" in error
    assert "Complete files stay (files: 4)" in error
    assert run(*command("out")).exit_code == 0
    assert rows(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard", "2/2"], "--shard 2/2 is not a shard. Give its index and the number of shards, from 0/4 to 3/4."),
        (["--shard", "one"], "--shard one is not a shard"),
        (["--shard", "0/2", "--devices", "2"], "--shard and --devices exclude each other"),
        (["--shard", "0/2", "--overwrite"], "--shard and --overwrite exclude each other"),
        (["--devices", "0"], "--devices must be a number from 1"),
        (["--devices", "cpu,cpu"], "--device cpu and --devices cpu,cpu exclude each other"),
    ],
)
def test_bad_options(run: Run, texts: Path, words: list[str], message: str) -> None:
    result = run(*command("out", *words))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_of("2", None) == ["cpu", "cpu"]
    assert devices_of("cuda:0, cuda:2", None) == ["cuda:0", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("2", None) == ["cuda:0", "cuda:1"]
    assert devices_of("3", "cpu") == ["cpu"] * 3
    with pytest.raises(SettingError, match="asks for 3 GPUs, but there are only 2"):
        devices_of("3", None)
    with pytest.raises(SettingError, match="--device cuda:1 names one device"):
        devices_of("2", "cuda:1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes that are started have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
