"""Captum's methods as explainers: equal to Captum's own layer methods, at any site, with any output."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

pytest.importorskip("captum")
pytest.importorskip("transformers")

from captum import attr
from maskhooks_captum.explainer import _STREAM
from maskhooks_captum.gradients import IntegratedGradients

import maskhooks
from maskhooks.explainers.base import EXPLAINERS
from maskhooks.plugins.registry import registry
from maskhooks.seeds import seeded
from tests.adapters.captum_models import (
    HEADS,
    STATE,
    TOKENS,
    Mixed,
    bert,
    explained,
    made,
    mixed,
    padded,
    value_at,
    vectors,
)
from tests.conftest import fingerprint

METHODS = [
    "integrated-gradients",
    "input-x-gradient",
    "deep-lift",
    "feature-ablation",
    "occlusion",
    "shapley-sampling",
    "kernel-shap",
    "lime",
]
SAMPLED = ["shapley-sampling", "kernel-shap", "lime"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    if request.param in ("kernel-shap", "lime"):
        pytest.importorskip("sklearn")
    return str(request.param)


def text() -> tuple[Any, Any, dict[str, Tensor], list[int], Callable[..., Tensor], Tensor]:
    """A model, its `Hooked`, a batch, targets, the forward function of a user of Captum, and baseline ids."""
    model, batch = bert(), padded()
    targets: list[int] = model(**batch).logits.argmax(-1).tolist()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits

    return model, maskhooks.wrap(model), batch, targets, forward, torch.zeros_like(batch["input_ids"])


class TestAsCaptum:
    """Bit for bit what Captum's own layer method gives, where Captum has one."""

    @pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
    def test_integrated_gradients(self, double: bool) -> None:
        model, hooked, batch, targets, forward, base = text()
        model.double() if double else model
        theirs = attr.LayerIntegratedGradients(forward, model.bert.encoder.layer[1]).attribute(
            batch["input_ids"],
            base,
            target=targets,
            additional_forward_args=(batch["attention_mask"],),
            n_steps=20,
        )
        at_base = value_at(hooked, {**batch, "input_ids": base}, STATE)
        ours = explained(hooked, "integrated-gradients", batch, STATE, baseline=at_base, n_steps=20)
        assert torch.equal(ours, theirs.sum(-1).float())
        assert ours.abs().max() > 0.01

    def test_integrated_gradients_of_heads(self) -> None:
        model, hooked, batch, targets, forward, base = text()
        theirs = attr.LayerIntegratedGradients(forward, model.bert.encoder.layer[1].attention.output.dense).attribute(
            batch["input_ids"],
            base,
            target=targets,
            additional_forward_args=(batch["attention_mask"],),
            n_steps=20,
            attribute_to_layer_input=True,
        )
        at_base = value_at(hooked, {**batch, "input_ids": base}, HEADS)
        ours = explained(hooked, "integrated-gradients", batch, HEADS, baseline=at_base, n_steps=20)
        assert ours.shape == (3, 7, 2)
        valid = batch["attention_mask"].bool()
        assert torch.equal(ours[valid], theirs.unflatten(-1, (2, 8)).sum(-1)[valid])

    def test_input_x_gradient(self) -> None:
        model, hooked, batch, targets, forward, _ = text()
        theirs = attr.LayerGradientXActivation(forward, model.bert.encoder.layer[1]).attribute(
            batch["input_ids"], target=targets, additional_forward_args=(batch["attention_mask"],)
        )
        ours, valid = explained(hooked, "input-x-gradient", batch, STATE), batch["attention_mask"].bool()
        assert torch.equal(ours[valid], theirs.detach().sum(-1)[valid])

    def test_feature_ablation(self) -> None:
        model, hooked, batch, targets, forward, _ = text()
        theirs = attr.LayerFeatureAblation(forward, model.bert.encoder.layer[1]).attribute(
            batch["input_ids"],
            target=targets,
            additional_forward_args=(batch["attention_mask"],),
            layer_mask=torch.arange(7)[None, :, None],
        )
        ours = explained(hooked, "feature-ablation", batch, STATE)
        assert torch.equal(ours, theirs[..., 0])

    def test_deep_lift(self) -> None:
        hooked, x = mixed(), vectors()
        targets = hooked(x).argmax(-1)
        theirs = attr.LayerDeepLift(hooked.model, hooked.model.first).attribute(x, 0 * x, target=targets)
        base = value_at(hooked, 0 * x, "first:output")
        ours = explained(hooked, "deep-lift", x, "first:output", baseline=base)
        assert torch.allclose(ours, theirs.sum(-1).detach(), atol=1e-6)

    @pytest.mark.parametrize("name", SAMPLED)
    def test_sampled_methods_at_an_input(self, name: str) -> None:
        """Captum has no layer version of these: here the site is what the model takes."""
        pytest.importorskip("sklearn")
        hooked, x = mixed(sites={":input": TOKENS}), vectors(1)
        target = int(hooked(x).argmax())
        kinds = {"shapley-sampling": "ShapleyValueSampling", "kernel-shap": "KernelShap", "lime": "Lime"}
        ours = explained(hooked, name, x, ":input", n_samples=50)
        theirs, seed = getattr(attr, kinds[name])(hooked.model), seeded(0, _STREAM, 0)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        found = theirs.attribute(x, target=target, feature_mask=torch.arange(4)[None, :, None], n_samples=50)
        assert torch.allclose(ours, found[..., 0].float(), atol=1e-6)
        assert ours.abs().max() > 0.001

    def test_occlusion(self) -> None:
        hooked, x = mixed(sites={":input": TOKENS}), vectors()
        theirs = attr.Occlusion(hooked.model).attribute(x, (2, 5), (1, 5), target=hooked(x).argmax(-1))
        assert torch.equal(explained(hooked, "occlusion", x, ":input", window=2), theirs[..., 0].float())

    def test_no_warning_and_no_trace(self, method: str) -> None:
        hooked, x = mixed(), vectors()
        before, numbers = fingerprint(hooked.model), np.random.get_state()[1].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explained(hooked, method, x, "first:output")
        assert fingerprint(hooked.model) == before
        assert np.random.get_state()[1].tolist() == numbers


class TestSites:
    def test_all_at_once(self, method: str) -> None:
        """Each site by itself, in the rows of one explanation."""
        hooked = maskhooks.wrap(bert())
        if method == "deep-lift":
            pytest.skip("attention and normalisation have no rule")
        sites = ["bert.embeddings.word_embeddings:output", HEADS, STATE]
        explanation = made(method, hooked, sites).explain(padded())
        assert list(explanation.sites) == sites
        assert len(explanation) == 3 * 7 * (1 + 2 + 1)
        assert explanation["score"].min() < 0 < explanation["score"].max()
        assert (explanation["score"][~explanation["valid"]] == 0).all()
        assert explanation.provenance["score_label"] == "attribution"

    def test_sums_are_complete(self) -> None:
        """Integrated gradients and Shapley values sum to the output's difference."""
        _, hooked, batch, targets, _, base = text()
        other = {**batch, "input_ids": base}
        at_base = value_at(hooked, other, STATE)
        moved = (hooked(batch).logits - hooked(other).logits)[range(3), targets].detach()
        for name, settings in (("integrated-gradients", {"n_steps": 60}), ("shapley-sampling", {"n_samples": 2})):
            found = explained(hooked, name, batch, STATE, baseline=at_base, **settings)
            assert torch.allclose(found.sum(1), moved, atol=0.01 * float(moved.abs().max())), name

    def test_words(self) -> None:
        """Positions gated together have one score: the sum of gradients, or one for closing all."""
        words = torch.tensor([[0, 0, 1, 2, 2, 3, 4]]).expand(3, 7)
        hooked, batch = maskhooks.wrap(bert(), units=lambda batch: words), padded()
        alone = maskhooks.wrap(hooked.model)
        together = explained(hooked, "integrated-gradients", batch, STATE)
        apart = explained(alone, "integrated-gradients", batch, STATE)
        valid = batch["attention_mask"].bool()
        assert torch.allclose(together[:, 0], apart[:, :2].sum(1), atol=1e-6)
        assert torch.allclose(together[:, 3], apart[:, 3:5].sum(1), atol=1e-6)
        assert torch.equal(together[:, 0], together[:, 1])
        assert (together[~valid] == 0).all()
        ablated = explained(hooked, "feature-ablation", batch, STATE)
        value = value_at(hooked, batch, STATE)
        value[:, :2] = 0
        with torch.no_grad(), hooked.tap(replace={STATE: lambda old: value}):
            without = hooked(batch).logits
        targets = hooked(batch).logits.argmax(-1)
        drop = (hooked(batch).logits - without).gather(1, targets[:, None])[:, 0]
        assert torch.allclose(ablated[:, 0], drop, atol=1e-6)

    def test_windows_do_not_cut_words(self) -> None:
        hooked = maskhooks.wrap(bert(), units=lambda batch: torch.arange(7).expand(3, 7) // 2)
        with pytest.raises(maskhooks.errors.SettingError, match="gates positions together"):
            explained(hooked, "occlusion", padded(), STATE)

    @pytest.mark.parametrize("name", [name for name in METHODS if name != "deep-lift"])
    def test_batch_axis_second(self, name: str) -> None:
        """The same as with the batch axis first."""
        if name in ("kernel-shap", "lime"):
            pytest.importorskip("sklearn")

        class Turned(Mixed):
            def forward(self, x: Tensor) -> Tensor:
                hidden = self.act(self.first(x.transpose(0, 1))).sum(0)
                found: Tensor = self.last(self.relu(self.second(hidden)))
                return found

        here, there = mixed(), mixed(Turned(), sites={"first:output": "token batch hidden -> batch token"})
        there.model.load_state_dict(here.model.state_dict())
        ours, theirs = (explained(hooked, name, vectors(), "first:output") for hooked in (there, here))
        assert torch.allclose(ours, theirs, atol=1e-6)

    def test_pixels(self, method: str) -> None:
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
        pattern = "batch channel height width -> batch height width"
        hooked = mixed(net, sites={"0:output": pattern})
        found = explained(hooked, method, torch.randn(2, 1, 4, 4), "0:output")
        assert found.shape == (2, 4, 4)
        assert found.abs().max() > 0

    def test_an_example_with_one_position(self) -> None:
        """Captum's KernelShap fails at it."""
        pytest.importorskip("sklearn")
        valid = torch.arange(4) < torch.tensor([[4], [1], [2]])
        hooked = mixed(valid=lambda batch: valid)
        found = explained(hooked, "kernel-shap", vectors(), "first:output", n_samples=20)
        ablated = explained(hooked, "feature-ablation", vectors(), "first:output")
        assert torch.allclose(found[1, 0], ablated[1, 0], atol=1e-6)
        assert found[1, 0] != 0
        assert (found[~valid] == 0).all()


class TestGraphs:
    """The first axis of a message site is no batch axis."""

    def test_messages(self) -> None:
        pytest.importorskip("torch_geometric")
        from tests.adapters.geometric_models import Pooled, batch

        torch.manual_seed(0)
        hooked, data = maskhooks.wrap(Pooled().eval(), example=batch()), batch()
        site, targets = "first.message:output", hooked(data).argmax(-1)
        before = hooked(data)[range(3), targets].detach()
        with torch.no_grad(), hooked.tap(replace={site: torch.zeros_like}):
            moved = before - hooked(data)[range(3), targets]
        explainer = IntegratedGradients(hooked, site, n_steps=60)
        rows = explainer.explain(data)
        sums = [rows["score"][rows["example"] == example].sum() for example in range(3)]
        assert np.allclose(sums, moved, atol=1e-3)
        for name in ("feature-ablation", "shapley-sampling", "input-x-gradient", "occlusion"):
            found = made(name, hooked, site).explain(data)
            assert len(found) == len(rows)
            assert np.isfinite(found["score"]).all()

    def test_one_message_at_a_time(self) -> None:
        pytest.importorskip("torch_geometric")
        from tests.adapters.geometric_models import Pooled, batch

        torch.manual_seed(0)
        hooked, data = maskhooks.wrap(Pooled().eval(), example=batch()), batch()
        site, targets = "first.message:output", hooked(data).argmax(-1)
        rows = made("feature-ablation", hooked, site).explain(data)

        def without(value: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(value[:1]), value[1:]])

        with torch.no_grad(), hooked.tap(replace={site: without}):
            moved = hooked(data)[range(3), targets]
        with torch.no_grad():
            drop = float((hooked(data)[range(3), targets] - moved).sum())
        assert abs(rows["score"][0] - drop) < 1e-6


class TestOutputs:
    def test_targets(self, method: str) -> None:
        """One for all and one for each agree where they say the same."""
        hooked, x = mixed(), vectors()
        all_two = explained(hooked, method, x, "first:output", target=2)
        each = explained(hooked, method, x, "first:output", target=[2, 0, 2])
        as_tensor = explained(hooked, method, x, "first:output", target=torch.tensor([2, 0, 2]))
        assert torch.equal(all_two[[0, 2]], each[[0, 2]])
        assert torch.equal(each, as_tensor)
        assert not torch.equal(all_two[1], each[1])

    def test_logit_probability_and_its_logarithm(self) -> None:
        hooked, x, site = mixed(), vectors(), "first:output"
        with torch.no_grad():
            full = hooked(x)
            with hooked.tap(replace={site: lambda old: torch.cat([0 * old[:, :1], old[:, 1:]], 1)}):
                without = hooked(x)
        kinds: dict[Any, Callable[[Tensor], Tensor]] = {
            None: lambda logits: logits,
            "logit": lambda logits: logits,
            "log-prob": lambda logits: logits.log_softmax(-1),
            "prob": lambda logits: logits.softmax(-1),
        }
        for output, function in kinds.items():
            drop = (function(full) - function(without))[:, 1]
            found = explained(hooked, "feature-ablation", x, site, target=1, output=output)
            assert torch.allclose(found[:, 0], drop, atol=1e-6), output

    def test_log_probability_where_no_logits_are_returned(self) -> None:
        hooked = mixed(output=lambda logits: Categorical(logits=3 * logits))
        by_default = explained(hooked, "feature-ablation", vectors(), "first:output")
        assert torch.equal(
            by_default, explained(hooked, "feature-ablation", vectors(), "first:output", output="log-prob")
        )
        with pytest.raises(maskhooks.errors.SettingError, match="holds no tensor"):
            explained(hooked, "feature-ablation", vectors(), "first:output", output="logit")

    def test_yes_or_no(self) -> None:
        hooked = mixed(output=lambda logits: Bernoulli(logits=logits[:, 0]))
        yes, no = (explained(hooked, "input-x-gradient", vectors(), "first:output", target=one) for one in (1, 0))
        assert torch.equal(yes, -no)
        predicted = (hooked(vectors())[:, 0] > 0).long()
        found = explained(hooked, "input-x-gradient", vectors(), "first:output")
        assert torch.equal(found, torch.where(predicted[:, None] == 1, yes, no))

    def test_several_labels(self) -> None:
        hooked = mixed(output=lambda logits: Independent(Bernoulli(logits=logits), 1))
        plain = explained(mixed(), "input-x-gradient", vectors(), "first:output", target=2)
        assert torch.equal(explained(hooked, "input-x-gradient", vectors(), "first:output", target=2), plain)

    def test_a_number(self) -> None:
        hooked = mixed(output=lambda logits: Normal(logits[:, 1], 1.0))
        plain = explained(mixed(), "input-x-gradient", vectors(), "first:output", target=1)
        assert torch.equal(explained(hooked, "input-x-gradient", vectors(), "first:output"), plain)
        with pytest.raises(maskhooks.errors.SettingError, match="needs classes"):
            explained(hooked, "input-x-gradient", vectors(), "first:output", output="prob")

    def test_heads_are_summed_and_positions_averaged(self) -> None:
        def output(logits: Tensor) -> Any:
            chosen = torch.tensor([[True, False]]).expand(len(logits), 2)
            pair = Categorical(logits=torch.stack([logits, -logits], 1))
            return {"one": Categorical(logits=logits), "two": maskhooks.Positions(pair, chosen)}

        hooked = mixed(output=output)
        found = explained(hooked, "input-x-gradient", vectors(), "first:output")
        plain = explained(mixed(), "input-x-gradient", vectors(), "first:output")
        # The second head's logits are not returned as they are: its log-probability is explained.
        log = explained(mixed(), "input-x-gradient", vectors(), "first:output", output="log-prob")
        assert torch.allclose(found, plain + log, atol=1e-6)


class TestBaselines:
    def test_a_vector_for_all_positions(self) -> None:
        hooked, x, vector = mixed(), vectors(), torch.arange(6.0)
        ours = explained(hooked, "feature-ablation", x, "first:output", baseline=vector)
        token = explained(
            hooked, "feature-ablation", x, "first:output", baseline=maskhooks.masks.baselines.Token(vector)
        )
        full = explained(hooked, "feature-ablation", x, "first:output", baseline=vector.expand(3, 4, 6))
        assert torch.equal(ours, token)
        assert torch.equal(ours, full)
        assert not torch.equal(ours, explained(hooked, "feature-ablation", x, "first:output"))

    def test_the_mean_of_the_training_data(self) -> None:
        hooked, x = mixed(), vectors()
        explainer = IntegratedGradients(hooked, "first:output", baseline="mean")
        with pytest.raises(maskhooks.errors.NotFittedError, match="call fit"):
            explainer.explain(x)
        explainer.fit([x[:2], x[2:]])
        mean = value_at(hooked, x, "first:output").mean((0, 1))
        ours = torch.as_tensor(explainer.explain(x)["score"]).reshape(3, 4)
        theirs = explained(hooked, "integrated-gradients", x, "first:output", baseline=mean)
        assert torch.allclose(ours, theirs, atol=1e-6)

    def test_nothing_to_fit_on(self) -> None:
        with pytest.raises(maskhooks.errors.EmptyLoaderError):
            IntegratedGradients(mixed(), "first:output", baseline="mean").fit([])

    def test_padding_keeps_its_value(self) -> None:
        """A model that adds up all positions, padding too: only valid ones are replaced."""
        valid = torch.arange(4) < torch.tensor([[4], [2], [3]])
        hooked = mixed(valid=lambda batch: valid)
        with torch.no_grad():
            full = hooked(vectors())
            with hooked.tap(replace={"first:output": lambda old: old * ~valid[..., None]}):
                empty = hooked(vectors())
        moved = (full - empty)[:, 1]
        found = explained(hooked, "integrated-gradients", vectors(), "first:output", target=1, n_steps=500)
        assert torch.allclose(found.sum(1), moved, atol=0.01 * float(moved.abs().max()))


class TestSizesOfPasses:
    def test_they_change_nothing(self) -> None:
        hooked, x = mixed(), vectors()
        for name, settings in (
            ("integrated-gradients", {"internal_batch_size": 7}),
            ("integrated-gradients", {"internal_batch_size": 1}),
            ("feature-ablation", {"perturbations_per_eval": 3}),
            ("shapley-sampling", {"perturbations_per_eval": 4}),
            ("occlusion", {"perturbations_per_eval": 2}),
        ):
            plain = explained(hooked, name, x, "first:output")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.allclose(explained(hooked, name, x, "first:output", **settings), plain, atol=2e-6)

    def test_one_example(self, method: str) -> None:
        more = (
            {} if method in ("integrated-gradients", "input-x-gradient", "deep-lift") else {"perturbations_per_eval": 3}
        )
        found = explained(mixed(), method, vectors(1), "first:output", **more)
        assert found.shape == (1, 4)


@pytest.mark.parametrize("name", SAMPLED)
def test_seeds(name: str) -> None:
    pytest.importorskip("sklearn")
    hooked, x = mixed(), vectors()
    one, same, other = (explained(hooked, name, x, "first:output", n_samples=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_within_other_modes(method: str, mode: Any) -> None:
    """Captum's own gradient methods break in inference mode."""
    hooked, x = mixed(), vectors()
    plain = explained(hooked, method, x, "first:output")
    with mode():
        inside = torch.randn(1), explained(hooked, method, x + 0, "first:output")
    assert torch.equal(inside[1], plain)


def test_half_precision(method: str) -> None:
    """Where Captum computes in float32, the model still gets its own type."""
    hooked, x = mixed(Mixed().bfloat16()), vectors().bfloat16()
    if method == "deep-lift":
        pytest.skip("rounding in bfloat16 exceeds what it may miss")
    found = explained(hooked, method, x, "first:output")
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found.abs().max() > 0


def test_a_model_in_training_mode() -> None:
    """Captum leaves dropout on; a tap switches it off."""
    model = Mixed()
    model.act = nn.Sequential(nn.Dropout(0.5), nn.Tanh())
    hooked, x = mixed(model.train()), vectors()
    assert torch.equal(*(explained(hooked, "integrated-gradients", x, "first:output") for _ in range(2)))
    assert model.training


def test_on_the_command_line() -> None:
    """`maskhooks plugins` and `maskhooks settings` know them."""
    from typer.testing import CliRunner

    from maskhooks.cli.app import app

    if "integrated-gradients" not in registry.parts(EXPLAINERS):
        pytest.skip("the installed entry points are of an older version")
    listed = CliRunner().invoke(app, ["settings", "integrated-gradients"])
    assert listed.exit_code == 0
    assert "n_steps" in listed.output
