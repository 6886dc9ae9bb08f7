"""Sites of tiny models of a dozen families that are no plain encoder or decoder of text."""

from __future__ import annotations

import re
from typing import Any

import einops
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.checks.site_checks import bypassed
from maskhooks.hooks.frozen import frozen
from maskhooks.masks.mix import mix
from tests.conftest import same_bits

TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
BOTH = {
    **{
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in {"layers": 2, "ffn_dim": 32}.items()
    },
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
IMAGE = {"image_size": 32, "patch_size": 8}

# family: class, configuration, the batch's main input, sites of each kind
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, int]]] = {
    "bart": ("Seq2SeqLM", {**TEXT, **BOTH, "d_model": 16}, "input_ids", {"hidden": 8, "head": 6, "cross": 2, "mlp": 4}),
    "t5": (
        "Seq2SeqLM",
        {**TEXT, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0},
        "input_ids",
        {"hidden": 8, "head": 6, "cross": 2, "mlp": 4},
    ),
    "t5gemma": (
        "SequenceClassification",
        {side: {**TEXT, **LAYERS, "num_key_value_heads": 2, "head_dim": 8} for side in ("encoder", "decoder")},
        "input_ids",
        {"hidden": 8, "head": 6, "cross": 2, "mlp": 4},
    ),
    "falcon": (
        "CausalLM",
        {**TEXT, **LAYERS, "ffn_hidden_size": 32},
        "input_ids",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
    "mamba": (
        "CausalLM",
        {**TEXT, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "intermediate_size": 32},
        "input_ids",
        {"hidden": 4, "head": 0},
    ),
    "mixtral": (
        "CausalLM",
        {**TEXT, **LAYERS, "num_key_value_heads": 2, "num_local_experts": 4},
        "input_ids",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
    "xlm": (
        "SequenceClassification",
        {"vocab_size": 40, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_langs": 1, "pad_index": 0},
        "input_ids",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
    "squeezebert": (
        "SequenceClassification",
        {**TEXT, **LAYERS, "embedding_size": 16, **{f"{part}_groups": 1 for part in ("q", "k", "v", "intermediate")}},
        "input_ids",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
    "convbert": (
        "SequenceClassification",
        {**TEXT, **LAYERS, "num_attention_heads": 4, "embedding_size": 16},
        "input_ids",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
    "longformer": (
        "SequenceClassification",
        {**TEXT, **LAYERS, "attention_window": 4},
        "input_ids",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
    "longt5": (
        "Seq2SeqLM",
        {**TEXT, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0,
         "local_radius": 2},
        "input_ids",
        {"hidden": 8, "head": 6, "cross": 2, "mlp": 4},
    ),
    "vit": ("ImageClassification", {**LAYERS, **IMAGE}, "pixel_values", {"hidden": 4, "head": 2, "mlp": 2}),
    "segformer": (
        "ImageClassification",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]},
        "pixel_values",
        {},
    ),
    "resnet": (
        "ImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        "pixel_values",
        {"hidden": 4, "head": 0},
    ),
    "wav2vec2": (
        "SequenceClassification",
        {**LAYERS, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
        "input_values",
        {"hidden": 4, "head": 2, "mlp": 2},
    ),
}  # fmt: skip


def make(family: str) -> nn.Module:
    head, settings, main, _ = CASES[family]
    name = "AudioClassification" if main == "input_values" else head
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    model: nn.Module = getattr(transformers, f"AutoModelFor{name}").from_config(config)
    return model.eval()


def batch(family: str) -> dict[str, Tensor]:
    main = CASES[family][2]
    source = torch.Generator().manual_seed(1)
    if main == "pixel_values":
        return {main: torch.randn(2, 3, 32, 32, generator=source)}
    if main == "input_values":
        return {main: torch.randn(2, 800, generator=source)}
    ids = torch.randint(3, 40, (2, 9), generator=source)
    targets = {"decoder_input_ids": ids[:, :4].clone()} if CASES[family][0] == "Seq2SeqLM" else {}
    return {main: ids, "attention_mask": torch.ones_like(ids), **targets}


@pytest.mark.parametrize("family", CASES)
def test_sites_of_each_kind(family: str) -> None:
    hooked = maskhooks.wrap(make(family), example=batch(family))
    found = {kind: len(hooked.sites.tagged(kind)) for kind in CASES[family][3]}
    assert found == CASES[family][3]
    assert len(hooked.sites.tagged("input")) == 1
    hidden = [site.depth for site in hooked.sites.tagged("hidden")]
    assert len(hidden) >= 3
    assert hidden == sorted(set(hidden))


@pytest.mark.parametrize("family", CASES)
def test_open_gates_change_no_bit_and_each_closed_site_changes_something(family: str) -> None:
    hooked = maskhooks.wrap(make(family))
    with torch.no_grad(), frozen(hooked.model):
        clean = hooked(batch(family)).logits
        with hooked.tap(replace={site: lambda value: mix(value, torch.ones(()), value + 1) for site in hooked.sites}):
            assert same_bits(hooked(batch(family)).logits, clean)
        for site in hooked.sites:
            with hooked.tap(replace={site: lambda value: mix(value, torch.zeros(()), torch.full_like(value, 0.7))}):
                assert not torch.equal(hooked(batch(family)).logits, clean), site


@pytest.mark.parametrize("family", ["bart", "mixtral", "vit", "xlm"])
def test_heads_are_gated_one_by_one(family: str) -> None:
    hooked = maskhooks.wrap(make(family), example=batch(family))
    for site in hooked.sites.tagged("head"):
        assert site.shape is not None
        assert dict(site.gating().sizes) == {"head": 2}
        assert site.gating().feature_shape(torch.empty(site.shape)) == (2, 8)


def test_encoder_and_decoder_are_told_apart() -> None:
    hooked = maskhooks.wrap(make("bart"))
    sides = {site: site.tags & {"encoder", "decoder"} for site in hooked.sites}
    assert all(len(side) == 1 for side in sides.values())
    positions = {
        side: {site.gating().positions for site in hooked.sites.tagged(side)} for side in ("encoder", "decoder")
    }
    assert positions == {"encoder": {("batch", "token")}, "decoder": {("batch", "target")}}


def test_masks_of_inputs_read_the_encoders_states_alone() -> None:
    explainer = maskhooks.DiffMask(maskhooks.wrap(make("bart")), "input")
    assert explainer.conditioned_on is not None
    assert {site.gating().positions for site in explainer.conditioned_on} == {("batch", "token")}
    assert len(explainer.maskings) == 4


def test_patches_stand_in_rows_and_columns() -> None:
    hooked = maskhooks.wrap(make("vit"), example=batch("vit"))
    (site,) = hooked.sites.tagged("input")
    assert site.gating().positions == ("batch", "height", "width")
    assert site.shape == (2, 16, 4, 4)


@pytest.mark.parametrize("family", ["squeezebert", "xlm"])
def test_layers_without_a_call_of_their_own_have_states_with_no_way_around(family: str) -> None:
    hooked = maskhooks.wrap(make(family))
    found = bypassed(hooked, batch(family), hooked.sites.tagged("hidden"))
    assert set(found.values()) == {False}


@pytest.mark.parametrize(
    ("family", "values"), [("squeezebert", "value"), ("convbert", "value"), ("longformer", "value"), ("longt5", "v")]
)
def test_each_head_stands_where_its_pattern_says(family: str, values: str) -> None:
    hooked = maskhooks.wrap(make(family))
    site = hooked.sites.tagged("head")[0]
    (projection,) = (
        module
        for name, module in hooked.model.named_modules()
        if re.fullmatch(rf".*\.0\..*\.{values}", name) and ".1." not in name and "decoder" not in name
    )
    count, size = site.gating().sizes["head"], 8 if family != "convbert" else 4
    arrow = f"{site.gating().arrow.split('->')[0]} -> batch {site.gating().positions[1]} head dim"

    def heads() -> Tensor:
        with torch.no_grad(), hooked.tap(read=[site]) as tap:
            hooked(batch(family))
        return einops.rearrange(tap.values[site], arrow, head=count)[:, 1:]  # the first token attends otherwise

    before = heads()
    with torch.no_grad():
        for weight in projection.parameters():
            weight[size : 2 * size] = 0  # of the second head
    after = heads()
    assert not before[:, :, 1].eq(0).all()
    assert after[:, :, 1].eq(0).all()
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert torch.equal(after[:, :, 2:], before[:, :, 2:])


def test_answers_among_the_tokens_of_a_decoder() -> None:
    config = transformers.BartConfig(**TEXT, **BOTH, d_model=16)
    hooked = maskhooks.wrap(transformers.BartForQuestionAnswering(config))
    ids, targets = batch("bart")["input_ids"], torch.tensor([[4, 5, 6, 2], [4, 5, 2, 0]])
    for given, padding in (
        ({"input_ids": ids, "attention_mask": (ids > 5).long()}, ids <= 5),
        ({"input_ids": ids, "decoder_input_ids": targets}, torch.zeros(2, 4, dtype=torch.bool)),
        (
            {"input_ids": ids, "decoder_input_ids": targets, "decoder_attention_mask": (targets > 0).long()},
            targets == 0,
        ),
    ):
        with torch.no_grad(), frozen(hooked.model):
            result = hooked.distribution(hooked(given), given)
        assert isinstance(result, dict)
        for part in ("start", "end"):
            found = result[part]
            assert isinstance(found, Categorical)
            assert torch.equal(found.probs.eq(0), padding)


def test_an_answer_out_of_those_known() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    parts = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8, "num_qa_labels": 5}
    hooked = maskhooks.wrap(transformers.LxmertForQuestionAnswering(transformers.LxmertConfig(**sizes, **parts)))
    given = {"input_ids": batch("bart")["input_ids"], "visual_feats": torch.randn(2, 4, 8)}
    given["visual_pos"] = torch.rand(2, 4, 4)
    with torch.no_grad(), frozen(hooked.model):
        outputs = hooked(given)
        result = hooked.distribution(outputs, given)
    assert isinstance(result, Categorical)
    assert torch.allclose(result.probs, outputs.question_answering_score.softmax(-1))
    assert len(hooked.sites.tagged("head")) > 3
