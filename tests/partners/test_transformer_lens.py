"""TransformerLens: hook names are sites, found and by hand; values agree with its caches, gates act, its hooks stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskhooks
from maskhooks.errors import BatchError, SiteNeverFiredError
from maskhooks.model.outputs import kl
from tests.conftest import fingerprint, same_bits
from tests.partners.gates import PATTERN, act, last_token, trained

pytest.importorskip("transformers")
pytest.importorskip("transformer_lens")

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native, build_bridge_from_module

from tests.adapters.transformers_models import WORDS, make

IDS = torch.randint(4, WORDS, (3, 5), generator=torch.Generator().manual_seed(1))
OTHER = IDS.flip(0, 1)
PADDING = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
FIRST = "blocks.0.hook_resid_post:output"


def model_of(family: str) -> Any:
    head = "MaskedLM" if family == "bert" else "CausalLM"
    return make(family, head, attn_implementation="eager").eval()


def bridge_of(family: str) -> Any:
    """From a model in memory; nothing is looked for anywhere else."""
    if family == "native":
        sizes = {"d_model": 16, "n_layers": 3, "d_head": 4, "n_heads": 4, "n_ctx": 24, "d_vocab": WORDS}
        return used(boot_native(TransformerBridgeConfig(**sizes, act_fn="gelu", d_mlp=32, seed=1)).eval())
    model = model_of(family)
    return bridged(model)


def bridged(model: Any) -> Any:
    return used(build_bridge_from_module(model, type(model).__name__, hf_config=model.config))


def used(bridge: Any) -> Any:
    """After its first pass and its first cache, in which a bridge adds hooks and attributes of its own."""
    with torch.no_grad():
        bridge.run_with_cache(IDS)
        bridge(IDS, attention_mask=torch.ones_like(IDS))
    return bridge


def state(bridge: Any) -> list[Any]:
    """All that must be the same afterwards, in the model inside too."""
    hooks = {name: (list(point.fwd_hooks), list(point.bwd_hooks)) for name, point in bridge.hook_dict.items()}
    parts = [fingerprint(bridge), fingerprint(bridge.original_model)]
    # a bridge keeps the latest attention pattern of each pass
    return [hooks, *({key: held for key, held in part.items() if not key.endswith(" _pattern")} for part in parts)]


@pytest.fixture(params=["gpt2", "llama", "bert", "native"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return bridge_of(request.param)


def test_every_hook_that_fires_is_a_site_and_its_value_is_that_of_the_cache(bridge: Any) -> None:
    with torch.no_grad():
        usual, cache = bridge.run_with_cache(IDS)
    hooked = maskhooks.wrap(bridge)
    before = state(bridge)
    # off unless `set_use_hook_mlp_in`; caches may show another hook's value by this name
    names = [name for name in cache if not name.endswith("hook_mlp_in")]
    assert all(bridge.get_submodule(name) is bridge.hook_dict[name] for name in names)
    assert {"blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "hook_embed"} <= set(names)
    with torch.no_grad(), hooked.tap(read=[f"{name}:output" for name in names]) as tap:
        assert same_bits(hooked(IDS), usual)
    reshaped = 0
    for name in names:
        value, convert = tap.values[f"{name}:output"], bridge.hook_dict[name].hook_conversion
        if value.shape != cache[name].shape:  # TransformerLens shows heads apart
            reshaped += 1
            value = convert.convert(value)
        assert same_bits(value, cache[name]), name
    assert reshaped <= len(names) // 4
    assert state(bridge) == before


def test_gates_act_and_everything_is_as_it_was(bridge: Any) -> None:
    hooked = maskhooks.wrap(bridge, sites={FIRST: PATTERN}, output=last_token)  # found ones are tried below
    before = state(bridge)
    act(hooked, IDS, OTHER, FIRST, lambda outputs: outputs)
    report = maskhooks.doctor(hooked, IDS)
    assert report.healthy, str(report)
    with pytest.raises(ZeroDivisionError), hooked.tap(replace={FIRST: lambda value: 1 / 0}):  # type: ignore[dict-item, return-value]
        hooked(IDS)
    assert state(bridge) == before


def test_learns_what_it_learns_without_transformer_lens() -> None:
    model = model_of("gpt2")
    bare = maskhooks.wrap(copy.deepcopy(model), sites={"transformer.h.0:output": PATTERN}, output=last_token)
    bridge = bridged(model)
    hooked = maskhooks.wrap(bridge)
    before = state(bridge)
    found = trained(hooked, [FIRST], [IDS, OTHER])
    expected = trained(bare, ["transformer.h.0:output"], [{"input_ids": IDS}, {"input_ids": OTHER}])
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
    assert state(bridge) == before


def test_sites_and_what_it_predicts_are_found(bridge: Any) -> None:
    """As in the model inside, where that is one of transformers': same values, depths and tags, same prediction."""
    hooked = maskhooks.wrap(bridge)
    layers = range(bridge.cfg.n_layers)
    states = ["embed.hook_out", "blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in layers)]
    assert [str(site) for site in hooked.sites.tagged("hidden")] == [f"{name}:output" for name in states]
    assert [site.depth for site in hooked.sites.tagged("hidden")] == list(range(len(states)))
    assert [str(site) for site in hooked.sites.tagged("head")] == [f"blocks.{i}.attn.hook_z:output" for i in layers]
    assert [str(site) for site in hooked.sites.tagged("mlp")] == [f"blocks.{i}.hook_mlp_out:output" for i in layers]
    assert len(hooked.sites.tagged("input")) == 1
    mask = PADDING if bridge.cfg.attention_dir == "causal" else PADDING.flip(1)  # a bridge moves positions by it
    batch = {"input_ids": IDS, "attention_mask": mask}
    before = state(bridge)
    report = maskhooks.doctor(hooked, IDS)
    assert report.healthy, str(report)
    with torch.no_grad(), hooked.tap(read=list(hooked.sites)) as tap:
        found = hooked.distribution(hooked(batch), batch)
    for site in hooked.sites:
        assert site.gating().mask_shape(tap.values[site])[:2] == IDS.shape
    if hasattr(bridge.original_model, "config") and hasattr(bridge.original_model.config, "model_type"):
        inside = maskhooks.wrap(bridge.original_model)
        with torch.no_grad(), inside.tap(read=list(inside.sites)) as same:
            expected = inside.distribution(inside(batch), batch)
        assert kl(expected, found).abs().max() < 1e-6
        for tag in ("hidden", "head"):
            pairs = list(zip(hooked.sites.tagged(tag), inside.sites.tagged(tag), strict=True))
            assert [(one.depth, one.tags) for one, _ in pairs] == [(other.depth, other.tags) for _, other in pairs]
            for one, other in pairs:
                torch.testing.assert_close(tap.values[one].flatten(), same.values[other].flatten())
    assert state(bridge) == before


def test_an_encoder_and_a_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": WORDS, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    hooked = maskhooks.wrap(bridge)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": OTHER[:, :3]}
    assert [str(site) for site in hooked.sites.tagged("input")] == ["encoder_blocks.0.hook_resid_pre:output"]
    cross = hooked.sites.tagged("cross")
    assert {str(site.gating().arrow) for site in cross} == {"batch target (head dim) -> batch target head"}
    with torch.no_grad(), hooked.tap(read=list(hooked.sites)) as tap:
        found = hooked.distribution(hooked(batch), batch)
    assert len(tap.values) == len(hooked.sites)
    inside = maskhooks.wrap(bridge.original_model)
    with torch.no_grad():
        assert kl(inside.distribution(inside(batch), batch), found).abs().max() < 1e-6


def test_a_bridge_inside_a_model_of_the_users_own() -> None:
    outer = torch.nn.Sequential(bridge_of("gpt2"), torch.nn.Linear(WORDS, 3))
    hooked = maskhooks.wrap(outer)
    assert [str(site) for site in hooked.sites.tagged("input")] == ["0.embed.hook_out:output"]
    with torch.no_grad(), hooked.tap(read="hidden") as tap:
        hooked(IDS)
    assert len(tap.values) == 5


def test_texts_are_refused() -> None:
    hooked = maskhooks.wrap(bridge_of("gpt2"))
    with pytest.raises(BatchError, match="the batch has no input_ids"):
        hooked(["w5 w6 w7"])


def test_hooks_of_transformer_lens_see_what_was_put_in_place_and_the_other_way_round() -> None:
    bridge = bridge_of("gpt2")
    name = FIRST.removesuffix(":output")
    seen: list[Tensor] = []
    bridge.add_perma_hook(name, lambda value, hook: seen.append(value))
    hooked = maskhooks.wrap(bridge)
    before = state(bridge)
    with torch.no_grad():
        with hooked.tap(replace={FIRST: torch.zeros_like}):
            _, cache = bridge.run_with_cache(IDS)
        assert seen[-1].any()  # it stood there before the tap
        assert not cache[name].any()
        assert not cache["blocks.1.hook_resid_pre"].any()
        with hooked.tap(read=["blocks.1.hook_resid_pre:output"]) as tap:
            bridge.run_with_hooks(IDS, fwd_hooks=[(name, lambda value, hook: torch.zeros_like(value))])
        assert not tap.values["blocks.1.hook_resid_pre:output"].any()
        with hooked.tap(read=FIRST) as tap:
            bridge(IDS)
            bridge.reset_hooks()
            bridge(OTHER)
        assert same_bits(tap.values[FIRST], seen[-1])
    assert state(bridge)[0] == before[0]  # caches and `reset_hooks` put other hooks of a bridge's parts anew


def test_a_hook_that_is_switched_off_never_fires() -> None:
    hooked = maskhooks.wrap(bridge_of("bert"))
    with pytest.raises(SiteNeverFiredError, match="did not run"), hooked.tap(read="blocks.0.hook_mlp_in:output"):
        hooked(IDS)


def test_dropout_of_the_model_inside_is_off_too() -> None:
    """The model stands in no list of the bridge's modules, and some of its parts in no other."""
    bridge = bridge_of("gpt2").train()
    assert bridge.original_model.transformer.drop.training
    hooked = maskhooks.wrap(bridge)
    before = state(bridge)
    with hooked.tap(read=FIRST) as tap:
        assert torch.equal(hooked(IDS), hooked(IDS))
        assert not tap.outputs.requires_grad
    assert state(bridge) == before


def test_the_model_inside_is_wrapped_with_what_is_known_of_it() -> None:
    """Both orders: sites of a model found before, and after, TransformerLens put its parts in."""
    model = model_of("gpt2")
    early = maskhooks.wrap(model)
    with torch.no_grad(), early.tap(read=["hidden", "head"]) as tap:
        early(IDS)
    usual = tap.values
    bridge = bridged(model)
    late = maskhooks.wrap(bridge.original_model)
    before = state(bridge)
    for hooked in (early, late):
        with torch.no_grad(), hooked.tap(read=["hidden", "head"]) as tap:
            for run in (hooked, bridge):
                run(IDS)
                assert len(tap.values) == len(usual)
                for found, expected in zip(tap.values.values(), usual.values(), strict=True):
                    torch.testing.assert_close(found, expected)
    assert state(bridge) == before


def test_a_model_booted_with_its_tokenizer(tokenizer: Callable[[], Any]) -> None:
    model = model_of("gpt2")
    bridge = used(TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=tokenizer(), device="cpu"))
    hooked = maskhooks.wrap(bridge)
    before = state(bridge)
    texts = ["w5 w6 w7", "w8 w9 w10"]
    with torch.no_grad(), hooked.tap(read=FIRST) as tap:
        _, cache = bridge.run_with_cache(texts)
        assert same_bits(tap.values[FIRST], cache["blocks.0.hook_resid_post"])
        hooked(bridge.to_tokens(texts))
    assert same_bits(tap.values[FIRST], cache["blocks.0.hook_resid_post"])
    assert state(bridge) == before
