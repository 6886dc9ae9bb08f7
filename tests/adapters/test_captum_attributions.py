"""Our explainers as Captum's attributions: the same scores, in Captum's own tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical

pytest.importorskip("captum")
pytest.importorskip("transformers")

import transformers
from captum.attr import LLMAttribution, NoiseTunnel, TextTemplateInput, TextTokenInput
from captum.attr import visualization as pictures
from captum.metrics import infidelity, sensitivity_max
from maskhooks_captum import LayerMaskAttribution, MaskAttribution, PromptMaskAttribution

import maskhooks
from maskhooks.errors import BatchError, GradientError, NotFittedError, SettingError, UnknownNameError
from tests.adapters.captum_models import STATE, TOKENS, Mixed, bert, mixed, padded, vectors
from tests.conftest import fingerprint

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning"),
]

QUICK = dataclasses.replace(maskhooks.Recipe(), steps=4, baseline_steps=2, warmup_steps=2, validations=2)
FREE = {"amortized": False, "margin": 0.1, "recipe": QUICK}
EXPLAINERS: list[dict[str, Any]] = [
    {"name": "leave-one-out"},
    {"name": "erasure", "margin": 0.01},
    {"name": "beam", "margin": 0.01},
    {"name": "random", "seed": 3},
    {"name": "diffmask", **FREE},
    {"name": "graphmask", **FREE},
    {"name": "reinforce", "margin": 0.1, "recipe": QUICK},
]
LIKE = {
    "leave-one-out": maskhooks.LeaveOneOut,
    "erasure": maskhooks.Erasure,
    "beam": maskhooks.Beam,
    "random": maskhooks.Random,
    "diffmask": maskhooks.DiffMask,
    "graphmask": maskhooks.GraphMask,
    "reinforce": maskhooks.Reinforce,
}


@pytest.fixture(params=EXPLAINERS, ids=lambda ours: ours["name"])
def ours(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def scores(hooked: maskhooks.Hooked, ours: dict[str, Any], batch: Any, site: str) -> Tensor:
    """What `explain` says, for positions of `(batch, token)`."""
    settings = {key: value for key, value in ours.items() if key != "name"}
    explanation = LIKE[ours["name"]](hooked, sites=site, **settings).explain(batch)
    return torch.as_tensor(explanation["score"]).reshape(len(set(explanation["example"])), -1)


def same(model: nn.Module, action: Callable[[], Any]) -> Any:
    """The result; the model is as before."""
    before = fingerprint(model)
    found = action()
    assert fingerprint(model) == before
    return found


class TestScores:
    def test_of_inputs(self, ours: dict[str, Any]) -> None:
        hooked, x = mixed(sites={":input": TOKENS}), vectors()
        found = same(hooked.model, lambda: MaskAttribution(hooked.model, ours).attribute(x))
        assert found.shape == x.shape
        assert torch.allclose(found.sum(-1), scores(hooked, ours, x, ":input"), atol=1e-6)
        assert torch.equal(found[..., 0], found[..., 1])

    def test_of_a_layer(self, ours: dict[str, Any]) -> None:
        hooked, x = mixed(), vectors()
        attribution = LayerMaskAttribution(hooked.model, hooked.model.first, ours)
        found = same(hooked.model, lambda: attribution.attribute(x))
        assert found.shape == (3, 4, 6)
        assert torch.allclose(found.sum(-1), scores(hooked, ours, x, "first:output"), atol=1e-6)

    def test_of_the_input_of_a_layer(self) -> None:
        hooked, x = mixed(sites={"act:input": TOKENS}), vectors()
        found = LayerMaskAttribution(hooked.model, hooked.model.act, "leave-one-out").attribute(
            x, attribute_to_layer_input=True
        )
        assert torch.allclose(found.sum(-1), scores(hooked, EXPLAINERS[0], x, "act:input"), atol=1e-6)

    def test_of_a_layer_of_a_text_model(self) -> None:
        """As a user of Captum has it: ids, a mask as a further argument, a function, and a layer."""
        model, batch = bert(), padded()

        def forward(ids: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
            return logits

        attribution = LayerMaskAttribution(
            forward,
            model.bert.encoder.layer[1],
            "leave-one-out",
            model=model,
            valid=lambda batch: batch[1].bool(),
        )
        found = attribution.attribute(batch["input_ids"], additional_forward_args=(batch["attention_mask"],))
        mine = scores(maskhooks.wrap(model), EXPLAINERS[0], batch, STATE)
        assert found.shape == (3, 7, 16)
        assert torch.allclose(found.sum(-1), mine, atol=1e-6)

    def test_token_ids(self) -> None:
        """Each token replaced by [MASK], here 3."""
        model, ids = bert(), padded()["input_ids"]

        def forward(ids: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids).logits
            return logits

        attribution = MaskAttribution(forward, "leave-one-out", model=model, pattern="batch token -> batch token")
        found = attribution.attribute(ids, baselines=3)
        changed = ids.clone()
        changed[:, 2] = 3
        kl = maskhooks.model.outputs.kl
        moved = kl(*(Categorical(logits=forward(one).detach()) for one in (ids, changed)))
        assert torch.allclose(found[:, 2], -torch.expm1(-moved), atol=1e-5)

    def test_a_fitted_explainer(self) -> None:
        hooked, x = mixed(), vectors()
        explainer = maskhooks.DiffMask(hooked, "first:output", margin=0.1, recipe=QUICK)
        attribution = LayerMaskAttribution(hooked.model, hooked.model.first, explainer)
        with pytest.raises(NotFittedError):
            attribution.attribute(x)
        explainer.fit([x], [x], progress=False, accelerator="cpu")
        found = attribution.attribute(x)
        mine = torch.as_tensor(explainer.explain(x)["score"]).reshape(3, 4)
        assert torch.allclose(found.sum(-1), mine, atol=1e-6)
        by_address = LayerMaskAttribution(hooked.model, "first:output", explainer)
        assert torch.equal(by_address.attribute(x), found)

    def test_a_fitted_explainer_of_text(self) -> None:
        model, batch = bert(), padded()
        explainer = maskhooks.Random(maskhooks.wrap(model), STATE)
        attribution = LayerMaskAttribution(
            model,
            model.bert.encoder.layer[1],
            explainer,
            batch=lambda ids, mask: {"input_ids": ids, "attention_mask": mask},
        )
        found = attribution.attribute(batch["input_ids"], additional_forward_args=batch["attention_mask"])
        mine = torch.as_tensor(explainer.explain(batch)["score"]).reshape(3, 7)
        assert torch.allclose(found.sum(-1), mine, atol=1e-6)

    def test_messages_of_a_graph(self) -> None:
        pytest.importorskip("torch_geometric")
        from torch_geometric.data import Data

        from tests.adapters.geometric_models import Nodes, graph

        torch.manual_seed(0)
        model, data = Nodes().eval(), graph()
        hooked = maskhooks.wrap(model, example=data)
        explainer = maskhooks.GraphMask(hooked, "first.message:output", **FREE)
        attribution = LayerMaskAttribution(
            model,
            "first.message:output",
            explainer,
            batch=lambda x, edges: Data(x=x, edge_index=edges),
        )
        found = attribution.attribute(data.x, additional_forward_args=(data.edge_index,))
        assert found.shape == (7, 3)
        rows = explainer.explain(Data(x=data.x, edge_index=data.edge_index))
        assert np.allclose(found.sum(-1), rows["score"], atol=1e-6)

    def test_a_function_that_makes_one(self) -> None:
        x = vectors()
        model = Mixed()
        made = MaskAttribution(model, lambda hooked, sites: maskhooks.LeaveOneOut(hooked, sites, batch_size=2))
        assert torch.allclose(made.attribute(x), MaskAttribution(model, "leave-one-out").attribute(x), atol=1e-7)


class TestArguments:
    def test_a_tuple_gives_a_tuple(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.both = nn.Linear(7, 3)

            def forward(self, one: Tensor, two: Tensor, scale: float, more: Tensor) -> Tensor:
                found: Tensor = self.both(torch.cat([one.sum(1), two], 1)) * scale + more
                return found

        torch.manual_seed(0)
        one, two, more = vectors(), torch.randn(3, 2), torch.randn(3, 3)
        attribution = MaskAttribution(Two(), "leave-one-out")
        found = attribution.attribute((one, two), additional_forward_args=(0.5, more))
        assert [part.shape for part in found] == [one.shape, two.shape]
        alone = MaskAttribution(lambda two: attribution.forward_func(one, two, 0.5, more), "random", model=Two())
        assert isinstance(attribution.attribute((one, two), additional_forward_args=(0.5, more)), tuple)
        assert isinstance(alone.attribute((two,)), tuple)
        assert isinstance(alone.attribute(two), Tensor)

    def test_target_is_one_class_against_the_others(self) -> None:
        x, model = vectors(), Mixed()
        found = MaskAttribution(model, "leave-one-out").attribute(x, target=1)

        def whether(logits: Tensor) -> Bernoulli:
            share = logits.softmax(-1)[:, 1]
            return Bernoulli(probs=share)

        mine = MaskAttribution(model, "leave-one-out", output=whether).attribute(x)
        assert torch.allclose(found, mine, atol=1e-5)
        for same_target in ([1, 1, 1], torch.tensor(1), torch.tensor([1, 1, 1])):
            assert torch.equal(MaskAttribution(model, "leave-one-out").attribute(x, target=same_target), found)
        others = MaskAttribution(model, "leave-one-out").attribute(x, target=[1, 0, 2])
        assert torch.allclose(others[0], found[0])
        assert not torch.allclose(others[1], found[1])

    def test_baselines(self) -> None:
        x, model = vectors(), Mixed()
        attribution = MaskAttribution(model, "leave-one-out")
        value = torch.randn(1, 4, 5)
        found = attribution.attribute(x, baselines=value)
        changed = x.clone()
        changed[:, 2] = value[:, 2]
        moved = maskhooks.model.outputs.kl(*(Categorical(logits=model(one).detach()) for one in (x, changed)))
        assert torch.allclose(found.sum(-1)[:, 2], -torch.expm1(-moved), atol=1e-5)
        assert torch.equal(attribution.attribute(x, baselines=0), attribution.attribute(x))
        number = attribution.attribute(x, baselines=0.5)
        assert torch.allclose(number, attribution.attribute(x, baselines=torch.full_like(x, 0.5)), atol=1e-7)

    def test_a_number_per_example(self) -> None:
        x, model = vectors(), Mixed()
        first = MaskAttribution(lambda x: model(x)[:, 0], "leave-one-out", model=model).attribute(x)
        column = MaskAttribution(lambda x: model(x)[:, :1], "leave-one-out", model=model).attribute(x)
        assert first.abs().max() > 0
        assert torch.equal(first, column)

    @pytest.mark.parametrize("target", [3, -1, [0, 3, 0]])
    def test_target_out_of_range(self, target: Any) -> None:
        with pytest.raises(SettingError, match="out of range: there are 3 classes"):
            MaskAttribution(Mixed(), "leave-one-out").attribute(vectors(), target=target)

    @pytest.mark.parametrize(
        ("target", "words"), [((0, 1), "is not a class"), (0.5, "is not a class"), ([0, 1], "for 2 examples")]
    )
    def test_target_of_another_form(self, target: Any, words: str) -> None:
        with pytest.raises((SettingError, BatchError), match=words):
            MaskAttribution(Mixed(), "leave-one-out").attribute(vectors(), target=target)

    def test_target_without_classes(self) -> None:
        model = Mixed()
        numbers = MaskAttribution(lambda x: model(x)[:, 0], "leave-one-out", model=model)
        with pytest.raises(SettingError, match="needs outputs"):
            numbers.attribute(vectors(), target=0)
        with pytest.raises(SettingError, match="together with output="):
            MaskAttribution(model, "random", output=lambda x: Categorical(logits=x)).attribute(vectors(), target=0)

    @pytest.mark.parametrize("shape", [(5,), (2, 4, 5), (4, 5)])
    def test_baselines_of_another_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(SettingError, match="a baseline has shape"):
            MaskAttribution(Mixed(), "leave-one-out").attribute(vectors(), baselines=torch.zeros(shape))

    def test_another_number_of_baselines(self) -> None:
        with pytest.raises(SettingError, match="2 baselines for 1 inputs"):
            MaskAttribution(Mixed(), "leave-one-out").attribute(vectors(), baselines=(0, 1))

    def test_what_a_made_explainer_cannot_take(self) -> None:
        hooked = mixed()
        attribution = MaskAttribution(hooked.model, maskhooks.LeaveOneOut(hooked, "first:output"))
        for argument in ({"target": 1}, {"baselines": 1}):
            with pytest.raises(SettingError, match="cannot be given here"):
                attribution.attribute(vectors(), **argument)

    def test_baselines_of_a_layer(self) -> None:
        model = Mixed()
        with pytest.raises(SettingError, match="for a layer"):
            LayerMaskAttribution(model, model.first, "leave-one-out").attribute(vectors(), baselines=0)

    def test_an_address_without_an_explainer_of_it(self) -> None:
        with pytest.raises(SettingError, match="give the module"):
            LayerMaskAttribution(Mixed(), "first:output", "leave-one-out").attribute(vectors())

    def test_another_layer(self) -> None:
        hooked = mixed()
        explainer = maskhooks.LeaveOneOut(hooked, "first:output")
        with pytest.raises(SettingError, match="0 of them are this layer's output"):
            LayerMaskAttribution(hooked.model, hooked.model.second, explainer).attribute(vectors())

    def test_a_function_of_no_known_model(self) -> None:
        model = Mixed()
        with pytest.raises(SettingError, match="Name the model that it runs"):
            MaskAttribution(lambda x: model(x), "leave-one-out")
        MaskAttribution(model.forward, "leave-one-out").attribute(vectors())  # a method of it is

    def test_an_unknown_explainer(self) -> None:
        with pytest.raises(UnknownNameError, match="leave-one-out"):
            MaskAttribution(Mixed(), "leave-one-ut")

    def test_outputs_of_another_form(self) -> None:
        with pytest.raises(BatchError, match=r"returns \[3, 4, 5\]"):
            MaskAttribution(nn.Identity(), "leave-one-out").attribute(vectors())


class TestTools:
    """Captum's own, with ours inside."""

    def test_noise_tunnel(self, ours: dict[str, Any]) -> None:
        x, model = vectors(2), Mixed()
        tunnel = NoiseTunnel(MaskAttribution(model, ours))
        found = same(model, lambda: _still(lambda: tunnel.attribute(x, nt_samples=2, stdevs=0.1)))
        assert found.shape == x.shape
        assert found.isfinite().all()

    def test_noise_tunnel_without_noise(self) -> None:
        x, model = vectors(2), Mixed()
        attribution = MaskAttribution(model, "leave-one-out")
        found = NoiseTunnel(attribution).attribute(x, nt_samples=3, stdevs=0.0, target=1)
        assert torch.allclose(found, attribution.attribute(x, target=1), atol=1e-6)

    def test_infidelity(self) -> None:
        x, model = vectors(), Mixed()

        def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
            noise = 0.1 * torch.randn_like(inputs)
            return noise, inputs - noise

        attributions = MaskAttribution(model, "leave-one-out").attribute(x, target=1)
        found = infidelity(model, perturb, x, attributions, target=1, normalize=True)
        assert found.shape == (3,)
        assert (found >= 0).all()

    def test_sensitivity(self) -> None:
        x, model = vectors(2), Mixed()
        found = sensitivity_max(MaskAttribution(model, "leave-one-out").attribute, x, n_perturb_samples=2, target=1)
        assert found.shape == (2,)
        assert (found > 0).all()

    def test_pictures(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
        image = torch.rand(1, 3, 4, 4)
        found = MaskAttribution(net, "leave-one-out").attribute(image)
        parts = [part[0].permute(1, 2, 0).numpy() for part in (found, image)]
        figure, _ = pictures.visualize_image_attr(*parts, method="heat_map", sign="positive", use_pyplot=False)
        assert figure.axes

    def test_it_says_what_it_is(self) -> None:
        attribution = MaskAttribution(Mixed(), "leave-one-out")
        assert attribution.multiplies_by_inputs
        assert not attribution.has_convergence_delta()


class TestPrompts:
    @pytest.fixture
    def language(self) -> tuple[Any, Any]:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "a", "b", "c", "d", "e", "yes", "no"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[PAD]", eos_token="[PAD]"
        )
        torch.manual_seed(0)
        sizes = {"vocab_size": 9, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(bos_token_id=2, eos_token_id=6, **sizes)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4)
        return model, fast

    @pytest.mark.parametrize("in_tokens", [True, False])
    def test_each_token_of_the_answer(self, language: tuple[Any, Any], in_tokens: bool) -> None:
        model, tokenizer = language
        attribution = LLMAttribution(PromptMaskAttribution(model, "leave-one-out"), tokenizer)
        inputs = TextTokenInput("a b c d", tokenizer)
        found = same(
            model,
            lambda: attribution.attribute(
                inputs, target="yes no", use_cached_outputs=False, forward_in_tokens=in_tokens
            ),
        )
        assert found.token_attr.shape == (2, 4)
        # Without the third part, how far does the probability of "yes" move?
        ids = tokenizer("a b c d", return_tensors="pt")["input_ids"]
        without = ids.clone()
        without[0, 2] = 0  # Captum's baseline of a token
        yes = [model(one).logits[:, -1].detach().softmax(-1)[:, 7] for one in (ids, without)]
        moved = maskhooks.model.outputs.kl(*(Bernoulli(probs=one) for one in yes))
        assert torch.allclose(found.token_attr[0, 2], -torch.expm1(-moved[0]), atol=1e-4)
        assert found.seq_attr.abs().max() > 0

    def test_parts_of_a_template(self, language: tuple[Any, Any]) -> None:
        model, tokenizer = language
        attribution = LLMAttribution(PromptMaskAttribution(model, {"name": "erasure", "margin": 0.01}), tokenizer)
        inputs = TextTemplateInput("a {} c {}", ["b", "d"], baselines=["e", "e"])
        found = attribution.attribute(inputs, target="yes", use_cached_outputs=False)
        assert found.seq_attr.shape == (2,)
        assert set(found.seq_attr.tolist()) <= {0.0, 1.0}

    def test_what_needs_gradients(self, language: tuple[Any, Any]) -> None:
        model, tokenizer = language
        attribution = LLMAttribution(PromptMaskAttribution(model, {"name": "diffmask", **FREE}), tokenizer)
        with pytest.raises(GradientError):
            attribution.attribute(TextTokenInput("a b", tokenizer), target="yes", use_cached_outputs=False)

    def test_an_explainer_of_another_model(self) -> None:
        with pytest.raises(SettingError, match="belongs to a Hooked"):
            PromptMaskAttribution(Mixed(), maskhooks.Random(mixed(), "first:output"))


def _still(action: Callable[[], Any]) -> Any:
    """The result; NoiseTunnel's own draws from the global generator are undone."""
    with torch.random.fork_rng(devices=[]):
        return action()
