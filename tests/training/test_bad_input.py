"""Settings, sites, loaders and outputs that are refused, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.errors import (
    BatchError,
    EmptyLoaderError,
    MaskhooksError,
    NotATensorError,
    NotFittedError,
    PatternError,
    SettingError,
    UnknownDistributionError,
    UnknownNameError,
    UnknownSiteError,
)
from tests.conftest import fingerprint as state
from tests.masks.test_masking import Tagger
from tests.training.tagger_fits import QUICK, SITES, batches, fitted, wrapped


class TestBadInput:
    @pytest.mark.parametrize("margin", [0.0, -0.1, float("nan")])
    def test_margin(self, hooked, margin):
        with pytest.raises(SettingError, match="margin"):
            DiffMask(hooked, margin=margin)

    @pytest.mark.parametrize("margin", [True, "0.1", None, float("inf")])
    def test_margins_that_are_no_numbers(self, hooked, margin, unchecked):
        with pytest.raises(SettingError, match="margin"):
            DiffMask(hooked, margin=margin)

    @pytest.mark.parametrize("setting", [{"steps": 0}, {"steps": -5}, {"epochs": 0}])
    def test_steps(self, hooked, setting):
        with pytest.raises(SettingError, match="whole number from 1"):
            DiffMask(hooked, SITES[1], recipe=QUICK).fit(batches(), progress=False, **setting)

    def test_no_site(self, hooked):
        with pytest.raises(SettingError, match="sites must be a tag, an address"):
            DiffMask(hooked, sites=[])

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_tensors(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        hooked = maskhooks.wrap(encoder, call=lambda model, x: model(x, src_key_padding_mask=padding))
        read = hooked.tap(read=["layers.0:output"])
        with torch.no_grad(), pytest.raises(NotATensorError, match="enable_nested_tensor=False"), read:
            hooked(torch.randn(2, 5, 8))

    def test_unknown_site(self, hooked):
        with pytest.raises(UnknownSiteError, match=r"layers\.1:output"):
            DiffMask(hooked, "layers.1:outptu")

    def test_unknown_names(self, hooked):
        with pytest.raises(UnknownNameError, match="hard-concrete"):
            DiffMask(hooked, gate="hard-concret")
        with pytest.raises(UnknownNameError, match="learned"):
            DiffMask(hooked, baseline="learnt")

    def test_no_pattern(self):
        with pytest.raises(PatternError, match="has no pattern"):
            DiffMask(maskhooks.wrap(Tagger()), "layers.1:output")

    def test_a_pattern_that_does_not_fit(self):
        hooked = wrapped(sites={"layers.1:output": "batch feature -> batch feature"})
        with pytest.raises(PatternError, match=r"2 axes.*shape \[8, 6, 12\]"):
            fitted(hooked)

    def test_loaders(self, hooked):
        explainer = DiffMask(hooked, SITES[1], recipe=QUICK)
        with pytest.raises(EmptyLoaderError, match="training loader yields no batch"):
            explainer.fit([])
        with pytest.raises(EmptyLoaderError, match="validation loader yields no batch"):
            explainer.fit(batches(), [])
        with pytest.raises(EmptyLoaderError, match="read only once"):
            explainer.fit(b for b in batches())

    def test_outputs_without_a_distribution(self):
        before = state((hooked := wrapped(output=None)).model)
        with pytest.raises(UnknownDistributionError, match="output="):
            fitted(hooked)
        assert state(hooked.model) == before

    def test_a_batch_without_the_expected_keys(self, hooked):
        with pytest.raises(BatchError, match="call="):
            hooked({"text": torch.zeros(2, 3)})

    def test_precision_that_rewrites_weights(self, hooked):
        with pytest.raises(SettingError, match="16-mixed"):
            DiffMask(hooked, SITES[1], recipe=QUICK).fit(batches(), precision="bf16-true")

    def test_not_fitted(self, hooked, tmp_path):
        explainer = DiffMask(hooked, SITES[1])
        with pytest.raises(NotFittedError):
            explainer.explain(batches(1)[0])
        with pytest.raises(NotFittedError):
            explainer.save(tmp_path)

    def test_a_state_before_the_masked_site(self, hooked):
        with pytest.raises(SettingError, match="no state of `conditioned_on` comes at or after"):
            DiffMask(hooked, SITES[2], conditioned_on=SITES[0])


class TestRecipe:
    @pytest.mark.parametrize(
        ("setting", "found"),
        [
            ({"objective": "ratioo"}, r"no objective is named 'ratioo'.*Did you mean 'ratio'"),
            ({"optimizer": "adamw"}, r"no optimizer is named 'adamw'"),
            ({"probe": "x"}, "The probes are mlp, paper, summed"),
            ({"validations": 0}, "validations must be a whole number from 1, got 0"),
            ({"layer_warmup": 1.5}, "layer_warmup must be a number from 0 to 1"),
        ],
    )
    def test_settings_that_no_recipe_has(self, setting: dict[str, Any], found: str) -> None:
        with pytest.raises(MaskhooksError, match=found):
            Recipe(**setting)
