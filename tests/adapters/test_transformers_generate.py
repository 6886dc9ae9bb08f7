"""`generate` under a tap: the same tokens, prompts masked at every step, beams, and caches written again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from maskhooks_transformers.decoding import OnPrompt
from maskhooks_transformers.prompts import Prompts
from torch import Tensor, nn

from maskhooks import Hooked
from maskhooks.errors import ReplacementError
from maskhooks.hooks.replay import Replay
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import onward_pass
from tests.adapters.transformers_models import CLS, PAD
from tests.adapters.transformers_predictions import categorical, predict
from tests.adapters.transformers_prompts import FAMILIES, TEXTS, hook, left
from tests.conftest import same_bits


def generate(hooked: Hooked, batch: dict[str, Tensor], **settings: Any) -> Any:
    model: Any = hooked.model
    usual = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        found = model.generate(**batch, **{**usual, "return_dict_in_generate": True, "output_logits": True, **settings})
    return found.sequences, torch.stack(found.logits)


def given_to(family: str, hooked: Hooked) -> dict[str, Tensor]:
    batch = Prompts(hooked)(TEXTS)
    return batch if family == "t5" else left(batch)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_under_a_tap_writes_the_same_tokens(family: str, cache: bool) -> None:
    hooked = hook(family)
    hooked.model.eval().requires_grad_(False)  # PyTorch multiplies in another order by a weight that requires grad
    batch = given_to(family, hooked)
    usual, logits = generate(hooked, batch, use_cache=cache)
    sites = hooked.find(["hidden", "head", "mlp"])
    with hooked.tap(read=sites, replace=dict.fromkeys(sites, torch.clone)) as tap:
        tokens, tapped = generate(hooked, batch, use_cache=cache)
    assert torch.equal(tokens, usual)
    assert same_bits(tapped, logits)
    assert len(tap.values) == len(sites)
    again, after = generate(hooked, batch, use_cache=cache)
    assert torch.equal(again, usual)
    assert same_bits(after, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_prompt_is_masked_at_every_step(family: str) -> None:
    """With a cache the prompt is there once, without one at each step: both write the same."""
    hooked = hook(family)
    hooked.model.eval()
    batch = given_to(family, hooked)
    keep = torch.tensor([0.0, 1.0])[torch.randint(2, batch["input_ids"].shape)][..., None]
    usual = generate(hooked, batch)[1]
    sides = {"encoder"} if family == "t5" else {"hidden"}
    for site in [site for site in hooked.find("hidden") if sides <= site.tags]:
        written = []
        for cache in (True, False):
            masked = OnPrompt(lambda value: value * keep, batch["input_ids"].shape[1])
            with hooked.tap(replace={site: masked}):
                written.append(generate(hooked, batch, use_cache=cache))
        assert torch.equal(written[0][0], written[1][0]), site
        assert torch.allclose(written[0][1], written[1][1], atol=1e-4), site
        assert not torch.allclose(written[0][1], usual, atol=1e-2), site


def test_a_prompt_in_pieces_is_refused() -> None:
    hooked = hook("llama")
    hooked.model.eval()
    batch = given_to("llama", hooked)
    with hooked.tap(replace={hooked.sites[0]: OnPrompt(torch.zeros_like, 5)}):
        generate(hooked, batch)
        with pytest.raises(
            ReplacementError, match=r"a value has 2 tokens .* prompt's 5 were expected.*prefill_chunk_size"
        ):
            generate(hooked, batch, prefill_chunk_size=2)
        shorter = {key: value[:, 2:] for key, value in batch.items()}
        with pytest.raises(ReplacementError, match="a value has 3 tokens"):
            generate(hooked, shorter)
    single = {key: value[:, -1:] for key, value in batch.items()}
    with (
        hooked.tap(replace={hooked.sites[0]: OnPrompt(torch.zeros_like, 5)}),
        pytest.raises(ReplacementError, match="a value has 1 tokens"),
    ):
        generate(hooked, single)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_repeat_the_prompts(family: str) -> None:
    """A replacement fits the repeated rows; masked so, beams are those of the masked model without a cache."""
    hooked = hook(family)
    hooked.model.eval()
    batch = given_to(family, hooked)
    keep = torch.ones(2, batch["input_ids"].shape[1], 1)
    keep[:, -2] = 0
    rows = keep if family == "t5" else keep.repeat_interleave(3, 0)  # an encoder runs before beams are made
    written = []
    for cache in (True, False):
        masked = OnPrompt(lambda value: value * rows, keep.shape[1])
        with hooked.tap(read="input", replace={"input": masked}) as tap:
            written.append(generate(hooked, batch, use_cache=cache, num_beams=3)[0])
            assert len(tap.values[hooked.sites.tagged("input")[0]]) == len(rows)
    assert torch.equal(*written)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_writes_is_a_batch(family: str) -> None:
    hooked = hook(family)
    before, state = copy.deepcopy(hooked.model.state_dict()), torch.get_rng_state()
    prompts = Prompts(hooked)
    batch = prompts.written(TEXTS, max_new_tokens=4)
    assert hooked.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same_bits(weight, before[name]) for name, weight in hooked.model.state_dict().items())
    result = predict(hooked, batch)[1]
    assert hooked.task.predictions(result) == hooked.task.targets(batch)  # the likeliest tokens are what was written
    sampled = prompts.written(TEXTS, max_new_tokens=4, do_sample=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled["labels"].shape[0] == 2
    ids = [row[own.bool()].tolist() for row, own in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert ids[0][:5] == [CLS, 4, 5, 6, 7]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_replay_computes_again_what_writes_a_cache(family: str) -> None:
    """A replayed prefill leaves the cache that a full masked one leaves, and so the same continuation."""
    caches: list[Any] = []

    def call(model: nn.Module, batch: Any) -> Any:
        caches.append(transformers.DynamicCache())
        return model(**batch, past_key_values=caches[-1], use_cache=True)

    hooked = hook(family, call=call)
    batch = Prompts(hooked)(["word4 word5 word6"])
    site = hooked.find("hidden")[2]  # after the first layer
    clean = clean_pass(hooked, batch, [site], [site], Replay(hooked.model))
    with torch.no_grad():
        replayed = onward_pass(clean, {site: torch.zeros_like})
        with hooked.tap(replace={site: torch.zeros_like}):
            full = hooked.distribution(hooked(batch), batch)
        assert same_bits(categorical(replayed).logits, categorical(full).logits)
        played, whole = caches[-2:]
        assert [layer.keys.shape[2] for layer in played.layers] == [4] * len(whole.layers)
        for one, other in zip(played.layers, whole.layers, strict=True):
            assert same_bits(one.keys, other.keys)
            assert same_bits(one.values, other.values)
        token = torch.tensor([[9]])
        model: Callable[..., Any] = hooked.model.eval()
        onward = [model(input_ids=token, past_key_values=cache, use_cache=True).logits for cache in (played, whole)]
    assert same_bits(*onward)
