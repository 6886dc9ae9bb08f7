"""What `maskhooks fit` says of the margin, and what its table shows."""

from __future__ import annotations

import pytest
import torch

from maskhooks.cli.fit import _tell
from tests import tiny_runs as runs

pytestmark = pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")


def test_a_verdict_that_other_samples_do_not_share(capsys: pytest.CaptureFixture[str]) -> None:
    held = list(runs.loader(13, 4))
    made = runs.explainer(runs.SITES[1])
    made.fit(runs.loader(42, 8), held, steps=12, progress=False, accelerator="cpu")
    step = made.result.chosen_steps[str(made.groups[0])]
    chosen = next(row["divergence"] for row in made.result.validation if row["step"] == step)
    now = made.evaluate(held, progress=False)[0]["divergence"]
    assert chosen != now
    for margin, told in (
        (2 * max(chosen, now), "All masks keep the mean divergence within the margin"),
        (min(chosen, now) / 2, "Not all masks keep the mean divergence within the margin"),
        ((chosen + now) / 2, f"the largest mean divergence was {chosen:.3g} nats"),
    ):
        made.margin, made.result.within_margin = margin, chosen <= margin
        _tell(made, held, trained_only=False, budget=False)
        out = " ".join(capsys.readouterr().out.split())
        assert told in out
        assert f"{now:.3f}" in out  # the table's
        assert ("is chance" in out) == (min(chosen, now) < margin < max(chosen, now))


def test_masks_that_keep_nothing_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    held = list(runs.loader(13, 4))
    made = runs.explainer(runs.SITES[1])
    made.fit(runs.loader(42, 8), held, steps=2, progress=False, accelerator="cpu")
    told = f"No gate is open above one half at {made.groups[0].label}"
    _tell(made, held, trained_only=False, budget=False)
    assert told not in " ".join(capsys.readouterr().out.split())
    with torch.no_grad():
        made.maskings[0].votes[0].probe.bias.fill_(-20.0)
    _tell(made, held, trained_only=False, budget=False)
    assert told in " ".join(capsys.readouterr().out.split())
