"""Explainers that need no fit: masks optimised for each batch, and random scores."""

from __future__ import annotations

import dataclasses

import pytest

from maskhooks import DiffMask, Random
from maskhooks.errors import NotFittedError, SettingError
from tests.conftest import fingerprint as state
from tests.training.tagger_fits import QUICK, SITES, batches


class TestNotAmortized:
    def test_each_batch_has_logits_of_its_own(self, hooked):
        explainer = DiffMask(
            hooked, SITES[2], margin=0.05, amortized=False, recipe=dataclasses.replace(QUICK, steps=80)
        )
        before = state(hooked.model)
        one, again = (explainer.explain(batches(1)[0]) for _ in range(2))
        assert state(hooked.model) == before
        assert one == again
        assert 0.0 < one.select().mean_kept()[SITES[2], 2] < 0.95

    def test_a_learned_baseline_is_fitted_first(self, hooked):
        explainer = DiffMask(hooked, SITES[2], baseline="learned", amortized=False, recipe=QUICK)
        with pytest.raises(NotFittedError, match="fit"):
            explainer.evaluate(batches(1), progress=False)
        explainer.fit(batches(), progress=False)
        assert bool((explainer.maskings[0].baseline().abs() > 0).any())

    def test_free_logits_read_nothing(self, hooked):
        with pytest.raises(SettingError, match="read no states"):
            DiffMask(hooked, SITES[0], conditioned_on=SITES[1], amortized=False)


def test_random_scores(hooked):
    explainer = Random(hooked, SITES[1:3], seed=4)
    one = explainer.explain(batches(1)[0])
    assert one == explainer.explain(batches(1)[0])
    assert one != Random(hooked, SITES[1:3], seed=5).explain(batches(1)[0])
    assert 0.3 < one["score"].mean() < 0.7
