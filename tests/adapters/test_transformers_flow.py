"""What flows through models whose operations are out of the ordinary: cycles without gradients, streams, experts."""

from __future__ import annotations

import pytest
import torch
from maskhooks_transformers import flow
from maskhooks_transformers.marks import Marks
from torch import Tensor, nn
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    WavLMConfig,
    WavLMForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

import maskhooks
from maskhooks.masks.mix import mix

TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def ids() -> dict[str, Tensor]:
    tokens = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def slope(hooked: maskhooks.Hooked, site: maskhooks.Site, sample: float) -> Tensor | None:
    """The gradient to the value at a site through gates of this sample."""
    leaves: list[Tensor] = []

    def replaced(value: Tensor) -> Tensor:
        leaves.append(value.detach().clone().requires_grad_())
        return mix(leaves[-1], torch.tensor(sample), torch.full_like(value, 0.5).requires_grad_())

    with hooked.tap(replace={site: replaced}):
        hooked(ids()).logits.pow(2).sum().backward()
    return leaves[0].grad


def hrm() -> nn.Module:
    torch.manual_seed(0)
    return HrmTextForCausalLM(HrmTextConfig(**TEXT, **LAYERS, num_key_value_heads=2, head_dim=8)).eval()


def deepseek(heads: int = 2) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    ranks = {"q_lora_rank": 16, "o_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 2, "o_groups": 2}
    kinds = {"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["moe"] * 2, "num_key_value_heads": 1}
    layers = {**LAYERS, "num_attention_heads": heads}
    return DeepseekV4ForCausalLM(DeepseekV4Config(**TEXT, **layers, **sizes, **ranks, **kinds)).eval()


def test_cycles_within_no_grad_have_no_sites() -> None:
    hooked = maskhooks.wrap(hrm(), example=ids())
    hidden = hooked.sites.tagged("hidden")
    assert len(hidden) >= 3
    calls = {site.call for site in hidden if site.call is not None}
    assert calls
    assert min(calls) > 0
    for site in hooked.sites:
        found = slope(hooked, site, 1.0)
        assert found is not None, site
        assert bool(found.count_nonzero()), site


def test_streams_of_states_are_gated_together() -> None:
    hooked = maskhooks.wrap(deepseek(), example=ids())
    states = [site for site in hooked.sites.tagged("hidden") if site.shape is not None and len(site.shape) == 4]
    assert states
    assert {site.gating().positions for site in states} == {("batch", "token")}
    assert {str(site.pattern) for site in states} == {"batch token stream hidden -> batch token"}
    assert len(hooked.sites.tagged("head")) >= 2
    for site in states:
        found = slope(hooked, site, 0.0)
        assert found is None or not bool(found.count_nonzero())


@pytest.mark.parametrize(("heads", "gated"), [(2, {"head": 2}), (4, {"group": 2, "head": 2})])
def test_heads_in_groups_are_gated_one_by_one(heads: int, gated: dict[str, int]) -> None:
    hooked = maskhooks.wrap(deepseek(heads), example=ids())
    found = hooked.sites.tagged("head")
    assert len(found) == 2
    assert {site.gating().gated for site in found} == {("batch", "token", *gated)}
    explanation = maskhooks.Random(hooked, found[0]).explain(ids())
    assert len(explanation) == 2 * 9 * heads
    assert {name: int(explanation[name].max()) + 1 for name in gated} == gated


def test_attention_in_one_operation_tells_layers_from_the_convolutions_before_them() -> None:
    torch.manual_seed(0)
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    model = WavLMForSequenceClassification(WavLMConfig(**LAYERS, **convolutions, **positions)).eval()
    hooked = maskhooks.wrap(model)
    assert [len(hooked.sites.tagged(kind)) for kind in ("input", "hidden", "mlp")] == [1, 4, 2]


def test_heads_are_followed_through_views_of_another_stride() -> None:
    with Marks(values=True) as marks:
        query = torch.randn(5, 2, 7, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        side = attended.transpose(1, 2).contiguous().view(5, 7, 8).view(5, 7, 2, 4).view(5, 7, 8)
    label = marks.heads_of(side)
    assert label is not None
    assert label.codes.shape == side.shape
    assert (label.codes[0, 0] % 4096).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("expanded", [True, False])
def test_experts_take_a_shells_weights(expanded: bool) -> None:
    weights = torch.ones(()).expand(3, 8, 16) if expanded else torch.ones(3, 8, 16)
    tokens, ends = torch.randn(6, 8), torch.tensor([2, 4, 6], dtype=torch.int32)
    with Marks(values=True):
        result = torch.nn.functional.grouped_mm(tokens, weights, offs=ends)
    assert result.shape == (6, 16)


def test_a_shell_notes_calls_without_gradients() -> None:
    class Twice(nn.Module):
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(40, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            with torch.no_grad():
                state = self.layer(self.words(input_ids))
            return self.layer(state)

    calls = [call for call in flow.trace(Twice()).calls if call.name == "layer"]
    assert [call.graded for call in calls] == [False, True]


def test_the_input_of_a_recording_is_no_part_of_a_layer() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = WhisperConfig(**sizes, num_mel_bins=20, max_source_positions=24, classifier_proj_size=8)
    hooked = maskhooks.wrap(WhisperForAudioClassification(config).eval())
    assert [str(site) for site in hooked.sites.tagged("input")] == ["encoder.layers.0:input"]
    assert len(hooked.sites.tagged("hidden")) == 3


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_heads_are_found_where_a_kernel_hides_them(kernel: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TEXT, **LAYERS))
    usual = [str(site) for site in maskhooks.wrap(model).sites]
    assert any("o_proj" in name for name in usual)
    model.config._attn_implementation = kernel  # as loaded with it, where the kernel is installed
    assert [str(site) for site in maskhooks.wrap(model).sites] == usual
    assert model.config._attn_implementation == kernel
