"""Calibration: one number for all logits of a group, so that validation ends just within the margin."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from maskhooks import DiffMask
from maskhooks.masks.group import MaskingGroup
from maskhooks.progress import Bar
from maskhooks.training.calibration import Calibration
from tests import tiny_runs as runs
from tests.training.tagger_fits import QUICK, SITES, batches, fitted, wrapped
from tests.training.test_warm_start import bag, hooked_bag

CALIBRATED = dataclasses.replace(QUICK, calibrations=4)
MARGIN = 0.1


class Shifting(MaskingGroup):
    """Its divergence and what it keeps are functions of the shift."""

    def __init__(self, divergence):
        super().__init__(DiffMask(wrapped(), SITES[1]).maskings)
        self.divergence, self.shift = divergence, 0.0

    def shift_logits(self, by):
        self.shift += by

    def row(self):
        return {"divergence": self.divergence(self.shift), "expected_l0": 1 / (1 + math.exp(-self.shift))}


def searched(divergence, rounds):
    group = Shifting(divergence)
    search = Calibration(group, MARGIN, group.row())
    measured = 0
    for _ in range(rounds):
        if search.due:
            search.move()
            search.note(group.row())
            measured += 1
    row = search.settle()
    assert row == group.row()
    return group, row, measured


class TestSearch:
    @pytest.mark.parametrize("start", [0.03, 0.08, 0.12, 0.3])
    @pytest.mark.parametrize("slope", [0.3, 0.6, 1.2])
    def test_it_ends_just_within_the_margin(self, start, slope):
        def divergence(shift):
            return start * math.exp(-slope * shift - 0.02 * shift**2)

        _, row, _ = searched(divergence, 4)
        assert 0.9 * MARGIN < row["divergence"] <= MARGIN

    def test_a_mask_at_the_aim_is_not_measured_again(self):
        group, _, measured = searched(lambda shift: 0.097 * math.exp(-shift), 3)
        assert (group.shift, measured) == (0, 0)

    @pytest.mark.parametrize("start", [0.005, 2.0])
    def test_a_mask_far_from_the_margin_stays(self, start):
        group, _, measured = searched(lambda shift: start * math.exp(-shift), 3)
        assert (group.shift, measured) == (0, 0)

    def test_logits_that_do_not_shift(self):
        _, row, measured = searched(lambda shift: 0.2, 4)
        assert measured == 1
        assert row["divergence"] == 0.2

    @pytest.mark.parametrize("broken", [math.inf, 0.0])
    def test_a_divergence_that_says_nothing(self, broken):
        group, row, _ = searched(lambda shift: broken if abs(shift) < 1e-6 else 0.09, 3)
        assert math.isfinite(group.shift)
        assert row["divergence"] in (0.09, broken)

    def test_the_best_is_kept_when_the_last_is_worse(self):
        group, row, _ = searched(lambda shift: 0.05 if abs(shift) < 1e-6 else 0.4, 2)
        assert (round(group.shift, 6), row["divergence"]) == (0, 0.05)


class TestFit:
    @pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
    def test_it_uses_what_the_margin_allows(self):
        recipe = dataclasses.replace(QUICK, steps=40, baseline_steps=0, learning_rate=0.03)
        before, after = (
            DiffMask(hooked_bag(), "identity:output", margin=MARGIN, recipe=one).fit(
                bag(), bag(2), progress=False, accelerator="cpu"
            )
            for one in (recipe, dataclasses.replace(recipe, calibrations=5))
        )
        former, row = before.result.validation[-1], after.result.validation[-1]
        assert not 0.93 * MARGIN < former["divergence"] <= MARGIN
        assert 0.93 * MARGIN < row["divergence"] <= MARGIN
        assert before.result.validation[:-1] == after.result.validation[:-1]
        assert after.result.within_margin

    @pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
    @pytest.mark.parametrize("cumulative", [True, False])
    def test_masks_that_share_votes_stay_as_they_are(self, cumulative):
        given = {"margin": 0.001, "conditioned_on": SITES[1:3], "cumulative": cumulative}
        recipes = (QUICK, dataclasses.replace(CALIBRATED, sharpness=4.0))
        rows = [fitted(wrapped(), SITES[0], recipe=one, **given).result.validation[-1] for one in recipes]
        assert (rows[0] == rows[1]) is cumulative

    @pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
    def test_a_run_that_is_killed_calibrates_again(self, tmp_path, monkeypatch):
        recipe = dataclasses.replace(runs.QUICK, calibrations=3)
        for name, one in (("plain", runs.QUICK), ("whole", recipe)):
            runs.train(tmp_path / name, margin=5e-4, recipe=one)
        assert runs.results(tmp_path / "plain")["validation.csv"] != runs.results(tmp_path / "whole")["validation.csv"]
        with monkeypatch.context() as patch:
            patch.setattr(Calibration, "note", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                runs.train(tmp_path / "killed", margin=5e-4, recipe=recipe)
        runs.train(tmp_path / "killed", margin=5e-4, recipe=recipe, fit={"resume": True})
        assert runs.results(tmp_path / "killed") == runs.results(tmp_path / "whole")

    @pytest.mark.usefixtures("early_progress")
    def test_progress_goes_on(self, monkeypatch):
        """At the last step the count is full, but there is work left."""
        found, update = [], Bar.update

        def updated(bar, done=None, text=None, left=None, total=None):
            update(bar, done, text, left, total)
            found.append((done, text, bool(left)))

        monkeypatch.setattr(Bar, "update", updated)
        DiffMask(wrapped(), SITES[1], margin=5e-4, recipe=CALIBRATED).fit(batches(), batches(2), accelerator="cpu")
        steps, text = CALIBRATED.steps, "measuring on validation data"
        assert found.count((steps, text, True)) > 2  # two batches of the last comparison, and those of calibration
        assert found.count((10, text, True)) == 2
        assert found[-1][0] == steps
        assert found[-1][1] != text
        assert not found[-1][2]

    @pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
    def test_sharpened_gates_are_decided(self):
        recipe = dataclasses.replace(QUICK, steps=40, baseline_steps=0, learning_rate=0.03, calibrations=5)
        undecided = []
        for sharpness in (1.0, 4.0):
            explainer = DiffMask(
                hooked_bag(),
                "identity:output",
                margin=MARGIN,
                recipe=dataclasses.replace(recipe, sharpness=sharpness),
            )
            explainer.fit(bag(), bag(2), progress=False, accelerator="cpu")
            rows = explainer.explain(bag(2)[0]).columns
            p = rows["score"][rows["valid"]]
            undecided.append(float((p * (1 - p)).mean()))
            assert explainer.result.within_margin
        assert undecided[1] < 0.6 * undecided[0]

    @pytest.mark.parametrize("calibrations", [0, 1])
    def test_a_mask_that_is_stuck_open_is_released_at_comparisons(self, calibrations):
        still = {"learning_rate": 0.0, "baseline_learning_rate": 0.0, "probe": {"name": "mlp", "init_logit": 4.9}}
        recipe = dataclasses.replace(QUICK, calibrations=calibrations, **still)
        kept = [row["expected_l0"] for row in fitted(wrapped(), SITES[1], recipe=recipe).result.validation]
        assert kept[0] > 0.98
        assert (kept[0] - kept[1] > 0.02) is bool(calibrations)

    def test_without_validation_nothing_is_shifted(self):
        states = []
        for recipe in (QUICK, dataclasses.replace(CALIBRATED, sharpness=4.0)):
            explainer = DiffMask(wrapped(), SITES[1], margin=5.0, recipe=recipe)
            explainer.fit(batches(), steps=10, progress=False, accelerator="cpu")
            states.append([weight for part in explainer.parts for weight in part.state_dict().values()])
        assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
