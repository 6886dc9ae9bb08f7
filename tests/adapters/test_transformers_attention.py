"""Attention weights of Hugging Face models: those of the model, which stays as it was; and models that have none."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers import AutoModelForSeq2SeqLM as Seq2Seq
from transformers import AutoModelForSequenceClassification as Classifier

import maskhooks
from maskhooks import Attention, Rollout
from maskhooks.errors import ModelError, SettingError
from tests.adapters.transformers_models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    LAYERS,
    MASK,
    PAD,
    WORDS,
    batch,
    depth,
    make,
    tokenizer,
)
from tests.conftest import fingerprint
from tests.models import Broken

DATA = Path(os.environ.get("MASKHOOKS_DATA", Path(__file__).parents[3] / "shared"))
FOLDER = DATA / "models" / "minilm-sst5"
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "pad_token_id": PAD,
}


def settings(model: nn.Module) -> dict[str, Any]:
    """All attributes of the configuration, and the model's bits, hooks and flags."""
    return {"config": copy.deepcopy(vars(model.config)), **fingerprint(model)}  # type: ignore[arg-type]


def given(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The attention weights that an eager copy of the model returns."""
    own = copy.deepcopy(model).eval()
    own.set_attn_implementation("eager")
    task = maskhooks.wrap(own).task
    _, kwargs = task.arguments(own, inputs)
    with torch.no_grad():
        found: tuple[Tensor, ...] = own(**kwargs, output_attentions=True).attentions
    return found


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["SequenceClassification", "language model"])
def test_the_weights_are_those_of_the_model(family: str, head: str, left: bool) -> None:
    heads = {"language model": "CausalLM" if family in DECODERS else "MaskedLM"}
    model, inputs = make(family, heads.get(head, head)), batch(left=left)
    if family in ENCODERS:
        inputs["input_ids"][:, 3] = MASK
    before = settings(model)
    hooked = maskhooks.wrap(model)
    found = Attention(hooked, queries="last").explain(inputs)
    flow = Rollout(hooked, layer=None).explain(inputs)
    assert settings(model) == before
    tables, valid = given(model, inputs), inputs["attention_mask"].bool()
    assert len(tables) == depth(model)
    last = [int(row.nonzero().max()) for row in valid]
    for layer, table in enumerate(tables):
        rows = found.select(depth=layer + 1, valid=None)
        right = torch.stack([one.amax(0)[query] for one, query in zip(table, last, strict=True)])
        np.testing.assert_allclose(rows["score"].reshape(3, 7), right * valid, atol=1e-6)
        assert np.array_equal(rows["valid"].reshape(3, 7), valid)
        for example in range(3):
            assert flow.select(example=example, depth=layer + 2)["score"].sum() == pytest.approx(1, abs=1e-5)
    assert not flow.select(valid=False)["score"].any()


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "SequenceClassification"), ("gpt2", "CausalLM"), ("llama", "CausalLM")]
)
def test_padding_does_not_count(family: str, head: str) -> None:
    """Neither its side nor its presence: each example alone has the same scores."""
    hooked, right, left = maskhooks.wrap(make(family, head)), batch(), batch(left=True)
    alone = {key: value[1:2, :4] for key, value in right.items()}
    for explainer in (Attention(hooked), Rollout(hooked, layer=None), Rollout(hooked, queries="cls")):
        found = explainer.explain(alone)["score"]
        np.testing.assert_allclose(explainer.explain(right).select(example=1)["score"], found, atol=1e-6)
        if family != "bert":  # whose positions count padding
            np.testing.assert_allclose(explainer.explain(left).select(example=1)["score"], found, atol=1e-6)


@pytest.mark.parametrize("side", [False, True], ids=["right", "left"])
def test_rollout_of_a_causal_model_looks_back(side: bool) -> None:
    found = Rollout(maskhooks.wrap(make("llama", "CausalLM")), queries=1).explain(batch(left=side))
    for example in range(3):
        scores = found.select(example=example)["score"]
        assert (scores[:2] > 0).all()
        assert not scores[2:].any()


class TestTheModelComesBack:
    def test_after_an_error_half_way(self) -> None:
        model = make("bert")
        hooked, calls = maskhooks.wrap(model, skip_checks=["model"]), []

        def fuse(module: nn.Module, args: Any, output: Any) -> None:
            calls.append(model.config._attn_implementation)
            if len(calls) == 2:
                raise Broken("on demand")

        model.bert.encoder.layer[1].register_forward_hook(fuse)
        before = settings(model)
        with pytest.raises(Broken):
            Rollout(hooked).explain(batch())
        assert calls == ["sdpa", "eager"]  # the clean pass runs as it is
        assert settings(model) == before

    def test_with_hooks_that_transformers_added_before(self) -> None:
        model = make("bert")
        model.config._attn_implementation = "eager"
        model.eval()(**batch(), output_attentions=True)
        before = settings(model)
        Attention(maskhooks.wrap(model)).explain(batch())
        assert settings(model) == before
        assert len(model(**batch(), output_attentions=True).attentions) == LAYERS

    def test_configurations_inside_others(self) -> None:
        kinds = {"vision_config": {"hidden_size": 16}, "text_config": {"hidden_size": 16, "num_hidden_layers": 2}}
        config = AutoConfig.for_model("gemma3", **kinds)
        model = nn.Linear(2, 2)
        model.config = config  # type: ignore[assignment]
        from maskhooks_transformers.attention import returned

        parts = [config, config.text_config, config.vision_config]
        before = [copy.deepcopy(vars(part)) for part in parts]
        with returned(model):
            assert all(part._attn_implementation == "eager" and part.output_attentions for part in parts)
        assert [vars(part) for part in parts] == before


class TestRefused:
    @pytest.mark.parametrize("kind", [Attention, Rollout])
    def test_encoders_with_a_decoder(self, kind: Any) -> None:
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        model = Seq2Seq.from_config(AutoConfig.for_model("t5", vocab_size=WORDS, **sizes))
        before = settings(model)
        with pytest.raises(ModelError, match=r"several kinds \(.*cross_attentions.*LeaveOneOut"):
            kind(maskhooks.wrap(model)).explain(batch())
        assert settings(model) == before

    @pytest.mark.parametrize("family", ["mamba", "fnet"])
    def test_models_without(self, family: str) -> None:
        auto = AutoModelForCausalLM if family == "mamba" else Classifier
        model = auto.from_config(AutoConfig.for_model(family, **SIZES))
        with pytest.raises(ModelError, match=r"returns no attention weights: state-space.*Use LeaveOneOut"):
            Attention(maskhooks.wrap(model)).explain(batch())

    def test_what_rwkv_calls_attention(self) -> None:
        sizes = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 16}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes))
        with pytest.raises(ModelError, match=r"shape \[3, 1, 7, 16\].*LeaveOneOut"):
            Rollout(maskhooks.wrap(model)).explain(batch())

    def test_local_attention(self) -> None:
        model = Classifier.from_config(
            AutoConfig.for_model("longformer", **SIZES, attention_window=[4, 4], max_position_embeddings=40)
        )
        with pytest.raises(ModelError, match="several kinds"):
            Rollout(maskhooks.wrap(model)).explain(batch())

    def test_a_layer_out_of_range(self) -> None:
        with pytest.raises(SettingError, match="attention weights of 3 layers"):
            Attention(maskhooks.wrap(make("bert")), layer=3).explain(batch())


def test_patches_of_an_image() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8))
    found = Rollout(maskhooks.wrap(model), queries="cls").explain({"pixel_values": torch.randn(2, 3, 32, 32)})
    assert found.select(example=0)["score"].sum() == pytest.approx(1, abs=1e-5)
    assert found["label"][:2].tolist() == ["[CLS]", "(0, 0)"]
    assert found.plot().axes


def test_words_have_the_sum_of_their_pieces() -> None:
    model, words = make("bert"), torch.tensor([0, 1, 1, 2, 2, 2, 3]).expand(3, 7)
    one = Rollout(maskhooks.wrap(model, tokenizer=tokenizer())).explain(batch()).select(example=0)["score"]
    other = Rollout(maskhooks.wrap(model, units=lambda batch: words)).explain(batch()).select(example=0)["score"]
    np.testing.assert_allclose(other, [one[0], *[one[1:3].sum()] * 2, *[one[3:6].sum()] * 3, one[6]], rtol=1e-5)


def test_a_function_of_the_user_comes_first() -> None:
    model = make("bert")
    table = torch.eye(7).expand(3, 1, 7, 7)
    hooked = maskhooks.wrap(model, attention=lambda model, batch: [table] * LAYERS)
    assert Rollout(hooked, queries="cls").explain(batch()).select(example=0)["score"].tolist() == [1.0] + [0.0] * 6


@pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason=f"no model in {FOLDER} (MASKHOOKS_DATA)")
def test_a_trained_classifier() -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(FOLDER)
    inputs = dict(words(["A gorgeous , witty movie .", "It is a bad film ."], padding=True, return_tensors="pt"))
    model = Classifier.from_pretrained(FOLDER, dtype=torch.float32)
    before = settings(model)
    found = Attention(maskhooks.wrap(model, tokenizer=words)).explain(inputs)
    assert settings(model) == before
    valid = inputs["attention_mask"].bool()
    for layer, table in enumerate(given(model, inputs)):
        right = (table.amax(1) * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        np.testing.assert_allclose(
            found.select(depth=layer + 1, valid=None)["score"].reshape(2, -1), right * valid, atol=1e-6
        )
    assert found.select(example=1)["label"][4] == "bad"
