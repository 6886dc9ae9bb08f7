"""Small training runs, in this process or in one that is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

import maskhooks
from maskhooks import DiffMask, Recipe
from tests.masks.test_masking import TOKENS, Tagger

SITES = ["embedding:output", "layers.0:output", "layers.1:output"]
QUICK = dataclasses.replace(Recipe(), steps=12, baseline_steps=4, warmup_steps=5, validations=4)


def categorical(logits: Tensor) -> Categorical:
    return Categorical(logits=3 * logits)


def padding(batch: tuple[Tensor, Tensor]) -> Tensor:
    return batch[1]


def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """As long as the longest, so that batches differ in shape."""
    ids, valid = (torch.stack(column) for column in zip(*rows, strict=True))
    longest = int(valid.sum(1).max())
    return ids[:, :longest], valid[:, :longest]


def loader(count: int, size: int, *, shuffled: bool = False) -> DataLoader[Any]:
    source = torch.Generator().manual_seed(5)
    valid = torch.arange(6) < torch.randint(2, 7, (count, 1), generator=source)
    data = TensorDataset(torch.randint(0, 11, (count, 6), generator=source), valid)
    own = torch.Generator().manual_seed(3) if shuffled else None
    return DataLoader(data, batch_size=size, shuffle=shuffled, collate_fn=collate, generator=own)


def explainer(sites: str | list[str] = SITES[1:], **settings: Any) -> DiffMask:
    torch.manual_seed(0)
    hooked = maskhooks.wrap(Tagger(), sites=dict.fromkeys(SITES, TOKENS), output=categorical, valid=padding)
    return DiffMask(hooked, sites, **{"margin": 0.5, "recipe": QUICK, **settings})


def train(folder: Path | None, *, size: int = 8, fit: dict[str, Any] | None = None, **settings: Any) -> DiffMask:
    """A run of 24 steps over epochs of 6 shuffled batches, the last one smaller."""
    made = explainer(**settings)
    where = {"accelerator": "cpu", "progress": False, "run_dir": folder, "save_every": 0.0, **(fit or {})}
    return made.fit(loader(42, size, shuffled=True), loader(13, 4), **{"steps": 24, **where})


def results(folder: Path) -> dict[str, bytes]:
    """What a run leaves in its folder, byte for byte, but not its time, nor what a kill left half written."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".partial"]
    return {path.name: re.sub(rb'"seconds": [\d.e-]+', b'"seconds": 0', path.read_bytes()) for path in files}


@contextlib.contextmanager
def elsewhere(run: Callable[[], Any]) -> Any:
    """A process of its own that does `run`; its exit code is 0 where that ends well, negative where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(run,))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(run: Callable[[], Any]) -> None:
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
