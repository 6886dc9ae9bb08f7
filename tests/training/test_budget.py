"""Fits by a budget of time, the plan that is told before the first step, and masks that rest. The clock is not real."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from maskhooks import DiffMask
from maskhooks.errors import CacheWarning, MarginWarning, SettingError
from maskhooks.passes.clean_cache import CleanCache
from maskhooks.runs.run_state import has_state, state_folder
from maskhooks.settings.duration import Budget
from maskhooks.training import pace
from maskhooks.training.loop import Loop
from tests.training.tagger_fits import QUICK, SITES, batches, fitted

TICK = 0.04  # seconds between two looks at the clock


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    ticks = itertools.count(1)
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(ticks) * TICK)


def fit(hooked, budget, sites=SITES[1:3], margin=5.0, recipe=QUICK, **settings):
    explainer = DiffMask(hooked, sites, margin=margin, recipe=recipe)
    return explainer.fit(batches(), batches(1), budget=budget, accelerator="cpu", **{"progress": False, **settings})


class TestBudget:
    def test_it_ends_the_run(self, hooked):
        result = fit(hooked, "20s").result
        steps = len(result.log)
        assert result.stop_reason == f"the budget of 20 s was spent, after {steps} steps"
        assert 20 < steps < 2000
        assert len({row["step"] for row in result.validation}) == QUICK.validations
        assert result.validation[-1]["step"] == steps

    def test_twice_the_time_is_about_twice_the_steps(self, hooked):
        once, twice = (len(fit(hooked, budget).result.log) for budget in (20.0, 40.0))
        assert 1.7 < twice / once < 2.3

    def test_time_for_what_follows_is_kept(self, hooked):
        whole, less = (len(fit(hooked, Budget(20.0, checks_after=n)).result.log) for n in (0.0, 200.0))
        assert less < 0.8 * whole

    def test_time_spent_before_counts(self, hooked):
        begun = pace.time.monotonic() - 10
        assert len(fit(hooked, Budget(20.0, begun)).result.log) < 0.7 * len(fit(hooked, 20.0).result.log)

    def test_too_short(self, hooked):
        with pytest.raises(SettingError, match=r"budget of 0\.1 s is too short: the preparation took .* Give at least"):
            fit(hooked, 0.1)

    def test_too_short_leaves_no_run_to_resume(self, hooked, tmp_path):
        with pytest.raises(SettingError, match="too short"):
            fit(hooked, 0.1, run_dir=tmp_path)
        assert not has_state(state_folder(tmp_path))

    def test_beside_steps_or_epochs(self, hooked):
        for other in ({"steps": 3}, {"epochs": 1}):
            with pytest.raises(SettingError, match=f"give {next(iter(other))} or budget, not both"):
                fit(hooked, "5m", **other)

    @pytest.mark.usefixtures("early_progress")
    def test_what_it_tells(self, hooked, capfd):
        fit(hooked, "20s", progress=True)
        err = capfd.readouterr().err
        assert "Training 2 masks with the recipe stable within 20 s" in err
        assert "a step, measured on two." in err

    def test_a_margin_that_is_not_met(self, hooked):
        recipe = dataclasses.replace(QUICK, learning_rate=0.0, baseline_learning_rate=0.0)
        with pytest.warns(MarginWarning, match="Give a longer budget, or allow a larger margin"):
            fit(hooked, "5s", margin=1e-9, recipe=recipe)

    def test_a_run_resumes_with_the_time_that_is_left(self, hooked, tmp_path):
        whole = fit(hooked, "20s").result

        class Loader:
            def __init__(self, most):
                self.left = most

            def __iter__(self):
                for batch in batches():
                    if not self.left:
                        raise RuntimeError("on demand")
                    self.left -= 1
                    yield batch

        def run(most, **more):
            explainer = DiffMask(hooked, SITES[1:3], margin=5.0, recipe=QUICK)
            given = {"budget": "20s", "run_dir": tmp_path, "save_every": 0.0, "progress": False, "accelerator": "cpu"}
            return explainer.fit(Loader(most), batches(1), **given, **more).result

        with pytest.raises(RuntimeError, match="on demand"):
            run(60)
        rest = run(100_000, resume=True)
        assert rest.log[0]["step"] == 0
        assert "budget of 20 s" in rest.stop_reason
        assert 0.4 < len(rest.log) / len(whole.log) < 1.6

    @pytest.mark.parametrize("length", [{"budget": "5m"}, {"steps": 5}, {"epochs": 2}])
    def test_per_example_logits(self, hooked, length):
        explainer = DiffMask(hooked, SITES[1], amortized=False)
        with pytest.raises(SettingError, match=f"{next(iter(length))} limits .* per-example logits are optimised in"):
            explainer.fit(batches(), progress=False, **length)


class TestPace:
    def test_a_step_of_several_masks(self):
        found = pace.Pace(100, None, 0, 2, 0, together=2)
        found.steps = pace.interpolated(1.0, 3.0, 2)
        assert found.left(90) == pytest.approx(40)
        found.resting.add(0)
        assert found.left(90) == pytest.approx(30)
        found.resting.add(1)  # if all rest, all are trained
        assert found.left(90) == pytest.approx(40)

    @pytest.mark.parametrize(
        ("seconds", "checks", "calibrations"),
        [(1.0, 10, 2), (2.2, 9, 2), (5.0, 3, 2), (8.0, 1, 2), (12.0, 1, 1), (40.0, 1, 0)],
    )
    def test_a_budget_is_not_spent_on_checks(self, seconds, checks, calibrations):
        found = pace.Pace(0, Budget(100.0), 10, 1, 0, calibrations=2, check=pace.Timing(seconds, 1))
        found.begin()
        assert (found.checks, found.calibrations) == (checks, calibrations)

    def test_without_a_budget_checks_are_those_of_the_recipe(self):
        found = pace.Pace(100, None, 10, 1, 0, calibrations=2, check=pace.Timing(1000.0, 1))
        found.begin()
        assert (found.checks, found.calibrations) == (10, 2)

    def test_calibrations_follow_the_last_check(self):
        found = pace.Pace(100, None, 2, 1, 0, calibrations=3, check=pace.Timing(7.0, 1))
        found.steps = pace.interpolated(1.0, 1.0, 1)
        assert found.left(90) == pytest.approx(10 + 5 * 7)

    def test_clean_passes_that_do_not_fit_are_part_of_a_step(self):
        found = pace.Pace(100, None, 0, 1, 20, clean=pace.Timing(4.0, 1))
        found.steps = pace.interpolated(1.0, 1.0, 1)
        assert found.left(90) == pytest.approx(10)
        found.computed = 0.5
        assert found.left(90) == pytest.approx(30)

    def test_only_the_clean_passes_of_its_steps_are_computed(self):
        found = pace.Pace(10, None, 0, 1, 20, clean=pace.Timing(4.0, 1))
        found.steps = pace.interpolated(1.0, 1.0, 1)
        assert found.left(4) == pytest.approx(6 * (1 + 4))

    @pytest.mark.parametrize(("stored", "steps"), [(0, 20), (10, 60), (30, 20)])
    def test_steps_within_a_budget(self, stored, steps):
        """Each of the first steps stores a clean pass of 4 seconds; without a store, every step computes one."""
        found = pace.Pace(0, Budget(100.0), 0, 1, stored, clean=pace.Timing(4.0, 1))
        found.steps = pace.interpolated(1.0, 1.0, 1)
        assert found.planned(0) == pytest.approx(steps, abs=1)

    def test_steps_between_the_first_and_the_last(self):
        assert [one.mean for one in pace.interpolated(1.0, 3.0, 3)] == [1.0, 2.0, 3.0]
        assert [one.mean for one in pace.interpolated(5.0, 3.0, 1)] == [3.0]  # the first one warms up

    def test_a_cache_that_is_full(self, hooked, monkeypatch):
        found = []
        monkeypatch.setattr(Loop, "finish", lambda loop: found.append(loop.pace.computed) or loop.result)
        explainer = DiffMask(hooked, SITES[1], margin=5.0, recipe=QUICK)
        with pytest.warns(CacheWarning):
            explainer.fit(batches(), steps=4, cache=CleanCache(limit=0), progress=False, accelerator="cpu")
        assert found == [1.0]


class TestPlan:
    def test_it_is_told_before_the_first_step(self, hooked, capfd):
        fitted(hooked, SITES[1:3], steps=4)
        assert not capfd.readouterr().err
        DiffMask(hooked, SITES[1:3], margin=5.0, recipe=QUICK).fit(batches(), steps=4, accelerator="cpu")
        err = capfd.readouterr().err
        assert "Training 2 masks with the recipe stable in 4 steps takes about" in err
        assert "To end sooner, give a budget such as 5m" in err

    def test_measuring_changes_nothing(self, hooked):
        found = []
        for progress in (False, True):
            explainer = DiffMask(hooked, SITES[1:3], margin=5.0, recipe=QUICK)
            explainer.fit(batches(), batches(1), progress=progress, accelerator="cpu")
            found.append([*explainer.result.log, *explainer.explain(batches(1)[0])["score"].tolist()])
        assert found[0] == found[1]


class TestRests:
    @pytest.mark.parametrize(
        ("gains", "divergences", "expected"),
        [((0.2, 0.001), (1.0, 1.0), {1}), ((0.001, 0.001), (9.0, 1.0), {1}), ((0.2, 0.2), (1.0, 1.0), set())],
    )
    def test_who_rests(self, hooked, monkeypatch, gains, divergences, expected):
        found = []

        def rest(loop, rows):
            before = [{"expected_l0": 0.5, "divergence": divergence} for divergence in divergences]
            loop.result.validation[:] = before
            original(loop, [{**row, "expected_l0": 0.5 - gain} for row, gain in zip(before, gains, strict=True)])
            found.append(set(loop.resting))

        original = Loop._rest
        monkeypatch.setattr(Loop, "_rest", rest)
        fit(hooked, "5s", recipe=dataclasses.replace(QUICK, least_gain=0.01, validations=10))
        assert found[0] == expected

    def test_one_rests_and_the_other_gets_its_steps(self, hooked, monkeypatch):
        recipe = dataclasses.replace(QUICK, least_gain=0.01, validations=10, decay_fraction=0.9)
        explainer = DiffMask(hooked, SITES[1:3], margin=50.0, recipe=recipe)
        monkeypatch.setattr(Loop, "_rest", lambda loop, rows: loop.resting.add(0))
        explainer.fit(batches(), batches(1), steps=100, progress=False, accelerator="cpu")
        assert {row["site"] for row in explainer.result.log[10:69]} == {SITES[2]}
        assert {row["site"] for row in explainer.result.log[70:]} == set(SITES[1:3])
        assert torch.isfinite(torch.tensor(explainer.explain(batches(1)[0])["score"].tolist())).all()


class TestDraws:
    def test_all_sites_alike(self, hooked):
        explainer = DiffMask(hooked, SITES, margin=5.0, recipe=QUICK)
        explainer.fit(batches(), steps=200, progress=False, accelerator="cpu")
        counts = [sum(row["site"] == site for row in explainer.result.log) for site in SITES]
        assert min(counts) > 30
