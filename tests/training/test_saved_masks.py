"""Fitted masks on disk: what comes back, for which models, and which files are refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

import maskhooks
from maskhooks.errors import CorruptFileError, FingerprintError, FingerprintWarning, FormatError, SettingError
from maskhooks.model.fingerprint import differences, fingerprint
from tests.masks.test_masking import Tagger
from tests.tiny_runs import categorical, padding
from tests.training.tagger_fits import batches, fitted, wrapped


class TestStorage:
    def test_round_trip(self, hooked, tmp_path):
        explainer = fitted(hooked, "hidden")
        explainer.save(tmp_path)
        batch = batches(1)[0]
        for model in (hooked, hooked.model):
            given = {} if model is hooked else {"output": categorical, "valid": padding}
            again = maskhooks.load(tmp_path, model, **given)
            assert again.explain(batch) == explainer.explain(batch)
            assert again.within_margin == explainer.within_margin
        assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".csv", ".json", ".safetensors"]

    def test_another_model(self, hooked, tmp_path):
        fitted(hooked, run_dir=tmp_path)
        other = Tagger()
        other.head.weight.data += 1
        with pytest.raises(FingerprintError, match=r"head\.weight has different values") as caught:
            maskhooks.load(tmp_path, wrapped(other))
        assert caught.value.differences == ["head.weight has different values"]
        with pytest.warns(FingerprintWarning, match=r"head\.weight"):
            assert maskhooks.load(tmp_path, wrapped(other), strict=False).fitted

    def test_broken_files(self, hooked, tmp_path):
        explainer = fitted(hooked)
        for name in ("explainer.json", "weights.safetensors"):
            for data in (b"", b"\x00" * 40, pickle.dumps({"format": 1})):
                explainer.save(tmp_path)
                (tmp_path / name).write_bytes(data)
                with pytest.raises(CorruptFileError, match=name):
                    maskhooks.load(tmp_path, hooked)
            (tmp_path / name).unlink()
            with pytest.raises(CorruptFileError, match="cannot be read"):
                maskhooks.load(tmp_path, hooked)

    def test_another_format(self, hooked, tmp_path):
        fitted(hooked, run_dir=tmp_path)
        saved = json.loads((tmp_path / "explainer.json").read_text())
        (tmp_path / "explainer.json").write_text(json.dumps({**saved, "format": 99}))
        with pytest.raises(FormatError, match="has format 99, which another version of maskhooks wrote"):
            maskhooks.load(tmp_path, hooked)

    def test_the_first_version_is_refused_by_its_number(self, hooked, tmp_path):
        fitted(hooked, run_dir=tmp_path)
        saved = json.loads((tmp_path / "explainer.json").read_text())
        (tmp_path / "explainer.json").write_text(json.dumps({"format": 1, "settings": saved["settings"]}))
        with pytest.raises(
            FormatError, match=r"has format 1, which maskhooks 0\.1\.0 wrote; this version reads format 2"
        ):
            maskhooks.load(tmp_path, hooked)

    def test_weights_of_another_run(self, hooked, tmp_path):
        fitted(hooked, run_dir=tmp_path / "one")
        fitted(hooked, run_dir=tmp_path / "other", seed=1)
        (tmp_path / "other" / "weights.safetensors").replace(tmp_path / "one" / "weights.safetensors")
        with pytest.raises(CorruptFileError, match=r"does not hold the weights that explainer.json was saved with"):
            maskhooks.load(tmp_path / "one", hooked)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"weights": None}, "weights"),
            ({"settings": []}, "settings"),
            ({"shapes": {"a": 1}}, "shapes"),
            ({"further": 1}, "further"),
            ({"settings": {"margin": -1.0}}, "margin"),
            ({"settings": {"margin": "0.1"}}, "margin"),
            ({"settings": {"gate": 5}}, "gate"),
            ({"settings": {"heat": 1.0}}, "heat"),
            ({"settings": {"recipe": {"name": "stable", "heat": 1.0}}}, "heat"),
            ({"settings": {"recipe": {"name": "stable", "steps": 0}}}, "steps"),
        ],
    )
    def test_a_changed_file_is_named_with_the_field(self, hooked, tmp_path, change, field, unchecked):
        fitted(hooked, run_dir=tmp_path)
        saved = json.loads((tmp_path / "explainer.json").read_text())
        settings = change.get("settings")
        if isinstance(settings, dict):
            change = {"settings": {**saved["settings"], **settings}}
        (tmp_path / "explainer.json").write_text(json.dumps({**saved, **change}))
        with pytest.raises(CorruptFileError, match=f"explainer.json .*{field}"):
            maskhooks.load(tmp_path, hooked)

    def test_what_cannot_be_saved_is_passed_again(self, hooked, tmp_path):
        def own(original, masked):
            return (original.probs - masked.probs).abs().sum(-1)

        fitted(hooked, divergence=own, run_dir=tmp_path)
        with pytest.raises(SettingError, match="divergence="):
            maskhooks.load(tmp_path, hooked)
        assert maskhooks.load(tmp_path, hooked, divergence=own).divergence is own

    def test_a_halved_model_passes_for_itself(self):
        model = Tagger()
        again = Tagger()
        again.load_state_dict({name: t.to(torch.bfloat16).float() for name, t in model.state_dict().items()})
        assert not differences(fingerprint(model), fingerprint(again))
        grown = nn.Sequential(model)
        assert any("missing" in line for line in differences(fingerprint(model), fingerprint(grown)))
