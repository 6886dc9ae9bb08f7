"""The settings of devices: which there are, and which are refused."""

from __future__ import annotations

import pytest

from maskhooks.distributed.devices import make_fabric, ranks_of, starts_processes
from maskhooks.errors import SettingError
from tests import tiny_runs as runs


def test_one_process() -> None:
    fabric = make_fabric(accelerator="cpu", precision=None)
    fabric.launch()
    ranks = ranks_of(fabric)
    assert (ranks.rank, ranks.world_size, ranks.device.type) == (0, 1, "cpu")
    assert not starts_processes(fabric)


@pytest.mark.parametrize(
    ("strategy", "starts"), [("ddp", False), ("ddp_fork", True), ("ddp_notebook", True), ("ddp_spawn", True)]
)
def test_several_processes(strategy: str, starts: bool) -> None:
    assert starts_processes(make_fabric(accelerator="cpu", devices=2, strategy=strategy)) == starts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_time": 3}, "no setting 'max_time'"),
        ({"device": 2}, "no setting 'device'.*Did you mean 'devices'"),
        ({"precision": "bf16-true"}, "'bf16-mixed'"),
        ({"precision": "16-true"}, "would rewrite"),
        ({"accelerator": "cuda", "strategy": "fsdp", "devices": 2}, "."),
        ({"accelerator": "no-such"}, "no-such"),
        ({"strategy": "no-such"}, "no-such"),
    ],
)
def test_what_cannot_be_used_is_named(settings: dict[str, object], message: str) -> None:
    made = runs.explainer()
    with pytest.raises(SettingError, match=message):
        made.fit(runs.loader(8, 4), steps=2, progress=False, **settings)
    assert not made.fitted
