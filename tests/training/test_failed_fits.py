"""Fits that fail, at the start or at a number that is not finite: what is named, and what is left to explain."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical

from maskhooks import DiffMask
from maskhooks.errors import NonFiniteError, NotFittedError, UnknownDistributionError
from tests.masks.test_masking import Tagger
from tests.training.tagger_fits import QUICK, SITES, batches, fitted, wrapped


class Explodes(Tagger):
    """Gives NaN from a certain masked pass on."""

    def forward(self, ids, valid):
        logits = super().forward(ids, valid)
        return logits * float("nan") if torch.is_grad_enabled() and logits.requires_grad and self.after() else logits

    def after(self):
        self.passes = getattr(self, "passes", 0) + 1
        return self.passes > 20


def test_nan_that_no_distribution_takes_names_the_site():
    hooked = wrapped(Explodes(), output=lambda o: Categorical(logits=o, validate_args=True))
    explainer = DiffMask(hooked, SITES[2], margin=1.0, recipe=QUICK)
    with pytest.raises(NonFiniteError, match=r"masked output is not finite at step 19 on layers\.1:output"):
        explainer.fit(batches(), progress=False, accelerator="cpu")
    assert bool(torch.from_numpy(explainer.explain(batches(1)[0])["score"]).isfinite().all())


def test_nan_in_the_data():
    hooked = wrapped(output=lambda o: Categorical(logits=o, validate_args=True))
    explainer = fitted(hooked)
    hooked.model.embedding.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="outputs are not finite"):
        explainer.explain(batches(1)[0])


def test_nan_stops_and_keeps_the_last_good_state():
    hooked = wrapped(Explodes(), output=lambda o: Categorical(logits=o, validate_args=False))
    explainer = DiffMask(hooked, SITES[2], margin=1.0, recipe=QUICK)
    with pytest.raises(NonFiniteError, match=r"step 19 on layers\.1:output") as caught:
        explainer.fit(batches(), progress=False, accelerator="cpu")
    assert str(caught.value.site) == SITES[2]
    found = explainer.explain(batches(1)[0])
    assert bool(torch.from_numpy(found["score"]).isfinite().all())
    weights = [weight for group in explainer.groups for module in group.modules for weight in module.parameters()]
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_a_fit_that_fails_at_the_start_leaves_nothing_to_explain():
    explainer = DiffMask(wrapped(output=None), SITES[1], recipe=QUICK)
    with pytest.raises(UnknownDistributionError):
        explainer.fit(batches(), progress=False, accelerator="cpu")
    with pytest.raises(NotFittedError):
        explainer.explain(batches(1)[0])
