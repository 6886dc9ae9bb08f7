"""The doctor: sites that are sound, bypassed, called twice or never."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from maskhooks.checks.doctor import bypassed, doctor
from maskhooks.errors import BypassedWarning
from tests.masks.test_masking import TOKENS, Tagger
from tests.training.tagger_fits import SITES, batches, fitted, wrapped


@pytest.fixture
def hooked():
    return wrapped()


class Skips(Tagger):
    """Adds the embedding's mean to the last state: information goes around the layers."""

    def forward(self, ids, valid):
        return super().forward(ids, valid) + self.embedding(ids).mean((1, 2))[:, None] * torch.tensor([1.0, 0, 0])


class TestDoctor:
    def test_sound_sites(self, hooked):
        report = doctor(hooked, batches(1)[0])
        assert report.healthy
        assert [f.calls for f in report.findings] == [1] * 4
        assert all(f.bypassed is False for f in report.findings)
        assert "Categorical over batch [8]" in str(report)
        assert "layers.1:output" in report._repr_html_()

    def test_a_way_around(self):
        names = SITES[1:]
        hooked = wrapped(Skips(), sites={**dict.fromkeys(names, TOKENS)})
        report = doctor(hooked, batches(1)[0])
        assert all(f.bypassed for f in report.findings)
        assert not report.healthy
        with pytest.warns(BypassedWarning, match=r"layers\.1:output"):
            fitted(hooked)

    def test_nothing_to_tell(self, hooked):
        constant = wrapped(output=lambda o: Categorical(logits=torch.zeros_like(o)))
        site = hooked.find(SITES[1])[0]
        assert bypassed(constant, batches(1)[0], [site]) == {site: None}

    def test_troubles(self):
        class Twice(Tagger):
            def forward(self, ids, valid):
                self.layers[0](self.embedding(ids))
                return super().forward(ids, valid)

        model = Twice()
        model.unused = nn.Linear(2, 2)
        hooked = wrapped(model, sites=dict.fromkeys(["layers.0:output", "unused:output", "layers.1:output"], TOKENS))
        report = doctor(hooked, batches(1)[0])
        assert [bool(f.trouble) for f in report.findings] == [True, True, False]
        assert "fires 2 times" in report.findings[0].trouble
        assert "never fired" in report.findings[1].trouble
