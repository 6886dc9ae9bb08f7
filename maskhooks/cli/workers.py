"""Processes that share a job, one per device."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from maskhooks.cli.console import tell
from maskhooks.cli.job import Job
from maskhooks.errors import MaskhooksError, SettingError


def devices_of(devices: str, device: str | None) -> list[str]:
    """Return the device of each process.

    Args:
        devices: the number of processes, or the device of each, as in `cuda:0,cuda:2`.
        device: what the user wrote for --device.

    Raises:
        SettingError: there are fewer devices, or the two options contradict each other.
    """
    if not devices.isdigit():
        if device is not None:
            raise SettingError(f"--device {device} and --devices {devices} exclude each other. Give one of them.")
        return [name.strip() for name in devices.split(",") if name.strip()]
    number, kind = int(devices), device or ("cuda" if torch.cuda.is_available() else "cpu")
    if number < 1:
        raise SettingError(f"--devices must be a number from 1, or devices such as cuda:0,cuda:1, got {devices!r}")
    if kind == "cpu":
        return ["cpu"] * number
    if number > 1 and ":" in kind:
        raise SettingError(
            f"--device {kind} names one device, and --devices asks for {number}. Name each: --devices {kind},..."
        )
    if kind == "cuda" and number > torch.cuda.device_count():
        raise SettingError(
            f"--devices asks for {number} GPUs, but there are only {torch.cuda.device_count()}. Give fewer, or name "
            "one several times, as in cuda:0,cuda:0."
        )
    return [f"{kind}:{index}" for index in range(number)]


@dataclass
class _Worker:
    place: str
    process: SpawnProcess
    messages: Connection


def share(job: Job, places: list[str], advance: Callable[[int], None]) -> None:
    """Run a job in one process per device, each with every n-th file; return when all have ended.

    A process that fails is reported at once, and the others continue.

    Args:
        places: the device of each process.
        advance: called with each number of examples explained.

    Raises:
        MaskhooksError: a process failed.
    """
    workers = [_start(job, place, (number, len(places))) for number, place in enumerate(places)]
    told: list[str] = []
    try:
        for worker, message in _messages(workers):
            if isinstance(message, int):
                advance(message)
            elif message not in told:
                told.append(message)
                tell("error", f"{worker.place}: {message}", "red")
    finally:
        for worker in workers:
            worker.process.terminate()  # no file is ever half written
        for worker in workers:
            worker.process.join()
    if told:
        raise MaskhooksError(
            f"a process failed, of {len(places)}. Complete files are kept; run the same command again to resume."
        )


def _start(job: Job, place: str, shard: tuple[int, int]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # the only way that CUDA allows
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, place, shard, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of its messages
    return _Worker(place, process, ours)


def _messages(workers: list[_Worker]) -> Iterator[tuple[_Worker, Any]]:
    """Yield what the workers send until all have ended, and a message for each that died without one."""
    open_ends: dict[Any, _Worker] = {worker.messages: worker for worker in workers}
    while open_ends:
        for end in wait(list(open_ends)):
            worker = open_ends[end]
            try:
                yield worker, worker.messages.recv()
            except EOFError:
                del open_ends[end]
                worker.process.join()
                code = worker.process.exitcode or 0
                if code < 0:
                    yield worker, f"the process was killed ({_signal(-code)}). Was there enough memory?"
                elif code > 0:
                    yield worker, f"the process ended with code {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _work(job: Job, place: str, shard: tuple[int, int], threads: int, messages: Connection) -> None:
    """Run one shard in this process: send the numbers of examples explained, and errors; end without a reader."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C and ends this process
    if torch.device(place).type == "cpu":
        torch.set_num_threads(max(1, threads // shard[1]))
    try:
        job.work(place, shard, progress=messages.send)
    except BrokenPipeError:
        return
    except MaskhooksError as error:
        messages.send(str(error))
    except Exception:  # the parent reports it, and fails
        messages.send(traceback.format_exc())
