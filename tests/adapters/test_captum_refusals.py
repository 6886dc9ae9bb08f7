"""What Captum gets silently wrong, or fails at without saying why, is refused or works."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

pytest.importorskip("captum")
pytest.importorskip("transformers")

from maskhooks_captum.gradients import DeepLift, InputXGradient, IntegratedGradients
from maskhooks_captum.perturbations import FeatureAblation, KernelShap

import maskhooks
from maskhooks.errors import (
    BatchError,
    GradientError,
    MissingExtraError,
    NonFiniteError,
    PatternError,
    SettingError,
)
from tests.adapters.captum_models import STATE, TOKENS, Mixed, bert, explained, mixed, padded, vectors
from tests.conftest import fingerprint
from tests.fresh_process import printed_by
from tests.models import Broken

pytestmark = pytest.mark.usefixtures("unchecked")


def refused(
    error: type[Exception], words: str, hooked: Any, name: str, batch: Any, sites: Any, **settings: Any
) -> None:
    """The error names what is wrong, and the model comes back."""
    before = fingerprint(hooked.model)
    with pytest.raises(error, match=words):
        explained(hooked, name, batch, sites, **settings)
    assert fingerprint(hooked.model) == before


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class TestTargets:
    @pytest.mark.parametrize("name", ["integrated-gradients", "feature-ablation"])
    def test_out_of_range(self, name: str) -> None:
        refused(
            SettingError,
            "target 3 is out of range: the model has 3",
            mixed(),
            name,
            vectors(),
            "first:output",
            target=3,
        )

    @pytest.mark.parametrize("target", [-1, 1.0, "one", [0, -1], torch.tensor([[1]]), torch.tensor([0.5])])
    def test_of_another_type(self, target: Any) -> None:
        with pytest.raises(SettingError, match="target must be a whole number from 0"):
            IntegratedGradients(mixed(), "first:output", target=target)

    def test_for_another_number_of_examples(self) -> None:
        refused(
            BatchError, "for 2 examples, but the batch has 3", mixed(), "lime", vectors(), "first:output", target=[0, 1]
        )

    def test_without_one_prediction(self) -> None:
        heads = mixed(output=lambda logits: {"one": Categorical(logits=logits)})
        refused(SettingError, "several heads", heads, "feature-ablation", vectors(), "first:output", target=0)

    def test_of_a_number(self) -> None:
        numbers = mixed(output=lambda logits: torch.distributions.Normal(logits[:, 0], 1.0))
        refused(SettingError, "needs classes", numbers, "feature-ablation", vectors(), "first:output", target=0)

    def test_missing_is_the_prediction(self) -> None:
        """Captum's FeatureAblation and Occlusion return attributions of B*C examples there."""
        for name in ("feature-ablation", "occlusion", "shapley-sampling"):
            found = explained(mixed(), name, vectors(), "first:output")
            predicted = mixed()(vectors()).argmax(-1)
            assert torch.equal(found, explained(mixed(), name, vectors(), "first:output", target=predicted.tolist()))

    def test_two_classes_of_one_number(self) -> None:
        binary = mixed(output=lambda logits: Bernoulli(logits=logits[:, 0]))
        refused(SettingError, "has 2 classes", binary, "feature-ablation", vectors(), "first:output", target=2)


class TestBaselines:
    @pytest.mark.parametrize("shape", [(5,), (2, 4, 6), (4, 6), (1, 4, 6)])
    def test_of_another_shape(self, shape: tuple[int, ...]) -> None:
        """Captum broadcasts some of these without a word."""
        for name in ("integrated-gradients", "feature-ablation"):
            words = re.escape(f"has shape {list(shape)}, but the value of site first:output has shape [3, 4, 6]")
            refused(SettingError, words, mixed(), name, vectors(), "first:output", baseline=torch.zeros(shape))

    def test_unknown(self) -> None:
        with pytest.raises(maskhooks.errors.UnknownNameError, match="zero"):
            FeatureAblation(mixed(), "first:output", baseline="zeros")

    def test_one_object_for_two_sites(self) -> None:
        hooked = mixed(sites=dict.fromkeys([":input", "first:output"], TOKENS))
        with pytest.raises(SettingError, match="serves one site"):
            FeatureAblation(hooked, "*", baseline=maskhooks.masks.baselines.Zero())


class TestSettings:
    @pytest.mark.parametrize(("kind", "setting"), [(IntegratedGradients, "n_steps"), (KernelShap, "n_samples")])
    def test_none_at_all(self, kind: Any, setting: str) -> None:
        if kind is KernelShap:
            pytest.importorskip("sklearn")
        with pytest.raises(SettingError, match=f"{setting} must be a whole number from 1, got 0"):
            kind(mixed(), "first:output", **{setting: 0})


class TestValues:
    def test_tokens(self) -> None:
        model = maskhooks.wrap(bert(), sites={":input.input_ids": "batch token -> batch token"})
        refused(SettingError, "values of type torch.int64", model, "input-x-gradient", padded(), ":input.input_ids")

    def test_infinite(self) -> None:
        """Captum's ablation and Shapley values are NaN for all positions then."""
        x = vectors()
        x[1, 2, 3] = torch.inf
        hooked = mixed(sites={":input": TOKENS})
        for name in ("feature-ablation", "integrated-gradients", "shapley-sampling"):
            refused(NonFiniteError, "NaN or infinite", hooked, name, x, ":input")

    def test_infinite_where_padding_is(self) -> None:
        x, valid = vectors(), torch.arange(4).expand(3, 4) < 3
        hooked = mixed(sites={":input": TOKENS}, valid=lambda batch: valid)
        x[:, 3] = torch.nan
        refused(NonFiniteError, "not finite|NaN or infinite", hooked, "feature-ablation", x, ":input")

    def test_infinite_attributions(self) -> None:
        """The slope of a square root at zero."""
        net = nn.Sequential(nn.Linear(5, 6, bias=False), Root(), nn.Flatten(), nn.Linear(24, 3))
        hooked = mixed(net, sites={"0:output": TOKENS})
        refused(NonFiniteError, "attributions are NaN", hooked, "input-x-gradient", 0 * vectors(), "0:output")

    def test_no_gradient(self) -> None:
        class Detached(Mixed):
            def forward(self, x: Tensor) -> Tensor:
                hidden = self.act(self.first(x)).sum(1).detach()
                found: Tensor = self.last(self.relu(self.second(hidden)))
                return found

        hooked = mixed(Detached())
        for name in ("integrated-gradients", "input-x-gradient"):
            refused(
                GradientError, "first:output: its replacement requires grad", hooked, name, vectors(), "first:output"
            )
        assert explained(hooked, "feature-ablation", vectors(), "first:output").abs().max() > 0

    def test_batch_axis_in_parentheses(self) -> None:
        net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
        hooked = mixed(net, sites={"0:output": "(batch token) hidden -> batch token, token=2"})
        refused(PatternError, "batch axis by itself", hooked, "feature-ablation", vectors(4)[:, 0], "0:output")

    def test_other_rows_than_outputs(self) -> None:
        net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 6), nn.Unflatten(0, (-1, 4)), nn.Flatten(), nn.Linear(24, 3))
        hooked = mixed(net, sites={"1:output": "batch hidden -> batch"})
        refused(BatchError, "12 rows, but there are 3 outputs", hooked, "feature-ablation", vectors(), "1:output")


class TestBatches:
    def test_a_selection_of_another_length(self) -> None:
        hooked = mixed(select=lambda batch, numbers: batch)
        refused(BatchError, "Say how to select", hooked, "integrated-gradients", vectors(), "first:output")

    def test_a_longer_replacement_of_messages(self) -> None:
        """Parts of a value take the first rows of a longer replacement; here its length is compared."""
        pytest.importorskip("torch_geometric")
        from maskhooks_captum.at_site import AtSite
        from maskhooks_captum.explained import Explained
        from maskhooks_captum.layout import Layout

        from maskhooks.passes.clean import clean_pass
        from tests.adapters.geometric_models import Pooled, batch

        hooked = maskhooks.wrap(Pooled().eval(), example=batch())
        (site,) = hooked.required_sites("first.message:output")
        clean = clean_pass(hooked, batch(), [site])
        layout = Layout(clean, site)
        assert layout.whole
        at = AtSite(clean, layout, Explained(clean, None, None))
        twice = torch.cat([layout.value, layout.value], 1)
        with hooked.tap(replace={site: at.replacement}), pytest.raises(BatchError, match="was expected"):
            at(twice, at.rows)


class TestDeepLift:
    @pytest.mark.parametrize("part", ["function", "twice", "attention"])
    def test_what_has_no_rule(self, part: str) -> None:
        """Captum takes plain gradients there, and says nothing."""

        class Other(Mixed):
            def forward(self, x: Tensor) -> Tensor:
                hidden = self.first(x)
                hidden = torch.tanh(hidden) if part == "function" else self.act(self.act(hidden))
                found: Tensor = self.last(self.relu(self.second(hidden.sum(1))))
                return found

        hooked = maskhooks.wrap(bert()) if part == "attention" else mixed(Other())
        batch, site = (padded(), STATE) if part == "attention" else (10 * vectors(), "first:output")
        refused(SettingError, "deep-lift does not apply at", hooked, "deep-lift", batch, site)

    def test_log_probabilities(self) -> None:
        hooked = mixed()
        refused(SettingError, "does not apply", hooked, "deep-lift", 9 * vectors(), "first:output", output="log-prob")

    def test_messages(self) -> None:
        pytest.importorskip("torch_geometric")
        from tests.adapters.geometric_models import Pooled, batch

        hooked = maskhooks.wrap(Pooled().eval(), example=batch())
        with pytest.raises(SettingError, match="batch axis first"):
            DeepLift(hooked, "first.message:output").explain(batch())

    def test_nothing_is_left_where_the_model_raises(self) -> None:
        class Raising(Mixed):
            at = 99

            def forward(self, x: Tensor) -> Tensor:
                found = super().forward(x)
                self.__class__.at -= 1
                if self.at < 0:
                    raise Broken("on demand")
                return found

        hooked = mixed(Raising())
        before = fingerprint(hooked.model)
        for at in range(4):
            Raising.at = at
            with pytest.raises(Broken):
                DeepLift(hooked, "first:output").explain(vectors())
            assert fingerprint(hooked.model) == before


class TestMissingLibraries:
    def test_captum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "captum", None)
        monkeypatch.setitem(sys.modules, "captum.attr", None)
        with pytest.raises(MissingExtraError, match=re.escape("pip install 'maskhooks[captum]'")):
            InputXGradient(mixed(), "first:output")
        monkeypatch.delitem(sys.modules, "maskhooks_captum.attributions", raising=False)
        with pytest.raises(MissingExtraError, match="MaskAttribution needs captum"):
            from maskhooks_captum import MaskAttribution  # noqa: F401

    def test_sklearn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
        with pytest.raises(MissingExtraError, match="kernel-shap needs scikit-learn"):
            KernelShap(mixed(), "first:output")

    def test_importing_the_package_loads_nothing(self) -> None:
        code = "import sys, maskhooks_captum.plugin; print('captum' in sys.modules, 'sklearn' in sys.modules)"
        assert printed_by(code) == "False False"

    def test_a_name_that_is_not_there(self) -> None:
        with pytest.raises(ImportError, match="MaskAtribution"):
            from maskhooks_captum import MaskAtribution  # type: ignore[attr-defined] # noqa: F401
