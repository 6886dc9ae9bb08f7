"""Text generation: prompts and continuations, padding on either side, `generate` under a tap, chats."""

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
from transformers import PreTrainedModel

import maskhooks
from maskhooks import Hooked, Recipe
from maskhooks.errors import BatchError, ReplacementError, SettingError
from maskhooks.hooks.replay import Replay
from maskhooks.model.outputs import Positions, kl
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import onward_pass
from tests.adapters.test_transformers_task import categorical, positions, predict, tokenizer
from tests.adapters.transformers_models import CLS, FIRST, HIDDEN, PAD, SEP, WORDS, make
from tests.conftest import same_bits

TEXTS = ["word4 word5 word6 word7", "word8 word9"]
ENDS = ["word10", "word11 word12 word13"]
FAMILIES = ["gpt2", "llama", "t5"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}word5{% endif %}"
)


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=HIDDEN,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        pad_token_id=PAD,
        eos_token_id=SEP,
        decoder_start_token_id=PAD,
    )
    model: PreTrainedModel = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():  # larger than initialised, so that values differ visibly
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.train()


def hook(family: str, **settings: Any) -> Hooked:
    model = t5() if family == "t5" else make(family, "CausalLM")
    return maskhooks.wrap(model, **{"tokenizer": tokenizer(), **settings})


def left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch, padded on the left."""
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        key: torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)]) for key, value in batch.items()
    }


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One example without padding."""
    real = batch["attention_mask"][row].bool()
    return {key: value[row : row + 1, real] for key, value in batch.items()}


# Batches


def test_a_batch_of_prompts() -> None:
    batch = Prompts(hook("gpt2"))(TEXTS)
    assert batch["input_ids"].tolist() == [[CLS, 4, 5, 6, 7], [CLS, 8, 9, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "given", [ENDS, [[10], torch.tensor([11, 12, 13])], torch.tensor([[10, SEP, PAD], [11, 12, 13]])]
)
def test_a_batch_of_prompts_and_continuations(given: Any) -> None:
    hooked = hook("gpt2")
    batch = Prompts(hooked)(TEXTS, given)
    first = [10, SEP] if isinstance(given, Tensor) else [10]
    labels = [row[row != -100].tolist() for row in batch["labels"]]
    assert labels == [first, [11, 12, 13]]
    assert batch["input_ids"][0, : 5 + len(first)].tolist() == [CLS, 4, 5, 6, 7, *first]
    assert batch["input_ids"][1, :6].tolist() == [CLS, 8, 9, 11, 12, 13]
    where = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][where], batch["labels"][where])
    assert batch["attention_mask"].sum(1).tolist() == [5 + len(first), 6]
    assert hooked.task.targets(batch) == [" ".join(["word10", "[SEP]"][: len(first)]), "word11 word12 word13"]


def test_a_batch_for_an_encoder_decoder() -> None:
    hooked = hook("t5")
    batch = Prompts(hooked)(TEXTS, ENDS)
    assert batch["input_ids"].tolist() == [[CLS, 4, 5, 6, 7, SEP], [CLS, 8, 9, SEP, PAD, PAD]]
    assert batch["labels"].tolist() == [[CLS, 10, SEP, -100, -100], [CLS, 11, 12, 13, SEP]]
    assert batch["decoder_input_ids"].tolist() == [[PAD, CLS, 10, SEP, PAD], [PAD, CLS, 11, 12, 13]]
    assert batch["decoder_attention_mask"].sum(1).tolist() == [3, 5]
    assert hooked.task.targets(batch) == ["[CLS] word10 [SEP]", "[CLS] word11 word12 word13 [SEP]"]
    encoder, decoder = (hooked.sites.tagged(side)[0] for side in ("encoder", "decoder"))
    assert hooked.task.real(encoder, batch, torch.zeros(2, 6, HIDDEN)).sum(1).tolist() == [6, 4]
    assert hooked.task.real(decoder, batch, torch.zeros(2, 5, HIDDEN)).sum(1).tolist() == [3, 5]
    assert set(Prompts(hooked)(TEXTS)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("text", ["word4 word5", [CLS, 4, 5], torch.tensor([CLS, 4, 5])])
def test_a_prompt_is_a_text_or_token_ids(text: Any) -> None:
    assert Prompts(hook("llama"))([text])["input_ids"].tolist() == [[CLS, 4, 5]]


def test_a_text_and_its_continuation_are_read_together() -> None:
    """Tokenised alone a continuation may become other tokens; what counts is what the model would read."""

    class Seams:
        """Characters, but `ab` is a token of its own, and a text begins with an underscore."""

        pad_token_id, all_special_ids = 0, (0,)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            text = f"_{text}"
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text.replace("ab", "@")]}

    prompts = Prompts(hook("gpt2", tokenizer=Seams()))
    prompts.words.config.max_position_embeddings = 24

    def read(text: str, end: str) -> list[str]:
        batch = prompts([text], [end])
        known = batch["labels"][0] != -100
        return ["".join(map(chr, batch["input_ids"][0][own].tolist())) for own in (~known, known)]

    assert read("x", "y") == ["\x01_x", "y"]
    assert read("xa", "by") == ["\x01_xa", "_by"]  # one token over the seam: each as it is alone


def test_a_chat_goes_through_the_template() -> None:
    own = tokenizer()
    own.chat_template = CHAT
    prompts = Prompts(hook("llama", tokenizer=own))
    chat = [{"role": "word4", "content": "word8 word9"}, {"role": "word6", "content": "word7"}]
    batch = prompts([chat], ["word10"])
    assert batch["input_ids"].tolist() == [[4, 8, 9, 6, 7, 5, 10]]
    assert batch["labels"].tolist() == [[-100] * 6 + [10]]


def test_long_prompts() -> None:
    """What the model has no positions for is refused; where it may be cut, the end of a prompt stays."""
    hooked, long = hook("gpt2"), " ".join(f"word{index}" for index in range(FIRST, 34))
    with pytest.raises(BatchError, match=r"prompt 1 has 31 tokens and its continuation 1, .* for 24\..*max_length=24"):
        Prompts(hooked)(["word4", long], ["word5", "word6"])
    batch = Prompts(hooked, max_length=6)(["word4", long], ["word5", "word6 word7"])
    assert batch["input_ids"].tolist() == [[CLS, 4, 5, PAD, PAD, PAD], [CLS, 31, 32, 33, 6, 7]]
    with pytest.raises(BatchError, match="continuation 0 has 6 tokens, and no room is left"):
        Prompts(hooked, max_length=6)(["word4"], [[9] * 6])
    encoded = Prompts(hook("t5"), max_length=4)([long], ["word6"])
    assert encoded["input_ids"].tolist() == [[CLS, 4, 5, SEP]]


def test_what_is_no_prompt() -> None:
    prompts = Prompts(hook("gpt2"))
    with pytest.raises(BatchError, match=r"continuation 1 is empty: give at least one token"):
        prompts(TEXTS, ["word4", ""])
    with pytest.raises(BatchError, match="prompt 0 is empty"):
        prompts([[]])
    with pytest.raises(BatchError, match="2 prompts and 1 continuations"):
        prompts(TEXTS, ["word4"])
    with pytest.raises(BatchError, match="0 prompts and no continuations"):
        prompts([])
    with pytest.raises(BatchError, match="chat template, and this one has none"):
        prompts([[{"role": "user", "content": "word4"}]])
    bare = Prompts(maskhooks.wrap(make("gpt2", "CausalLM")))
    with pytest.raises(BatchError, match=r"a text needs a tokenizer.*wrap\(model, tokenizer=tokenizer\)"):
        bare(["word4"])
    assert bare([[4, 5]], [[6]])["input_ids"].tolist() == [[4, 5, 6]]
    with pytest.raises(SettingError, match=r"BertForSequenceClassification .* AutoModelForCausalLM"):
        Prompts(maskhooks.wrap(make("bert")))
    with pytest.raises(SettingError, match="max_length is 1"):
        Prompts(hook("gpt2"), max_length=1)


# What counts, and what is masked


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_continuation_counts_and_its_prompt_is_masked(family: str) -> None:
    hooked = hook(family)
    batch = Prompts(hooked)(TEXTS, ENDS)
    for given in (batch, left(batch)):
        outputs, result = predict(hooked, given)
        assert isinstance(result, Positions)
        assert result.chosen.sum(1).tolist() == [1, 3]
        for row in (0, 1):
            before = (given["labels"][row] != -100).nonzero().flatten() - 1
            own = outputs.logits[row, before].log_softmax(-1)
            assert torch.allclose(categorical(result.distribution).logits[row][result.chosen[row]], own, atol=1e-6)
        best = [
            row[own].tolist()
            for row, own in zip(categorical(result.distribution).logits.argmax(-1), result.chosen, strict=True)
        ]
        assert hooked.task.predictions(result) == [tokenizer().decode(row) for row in best]
        for site in hooked.find(["hidden", "head"]):
            value = torch.zeros(2, 6, HIDDEN if "hidden" in site.tags else 32)
            real = hooked.task.real(
                site, given, value if family == "llama" or "hidden" in site.tags else value[..., :16]
            )
            assert torch.equal(real, given["attention_mask"].bool() & (given["labels"] == -100)), site


def test_which_tokens_count_may_be_said() -> None:
    batch = Prompts(hook("llama"))(TEXTS, ENDS)
    outputs, last = predict(hook_like := hook("llama", positions="last"), batch)
    assert torch.allclose(categorical(last).logits, outputs.logits[[0, 1], [5, 5]].log_softmax(-1))
    assert hook_like.task.real(hook_like.sites[0], batch, torch.zeros(2, 6, HIDDEN)).sum() == 12
    assert positions(predict(hook("llama", positions="all"), batch)[1]).chosen.sum(1).tolist() == [5, 5]
    named = hook("llama", positions=lambda batch: torch.isin(batch["input_ids"], torch.tensor([5, 7, 8, PAD])))
    outputs, result = predict(named, batch)
    assert positions(result).chosen.sum(1).tolist() == [2, 1]
    logits = categorical(positions(result).distribution).logits
    assert torch.allclose(logits[0], outputs.logits[0, [2, 4]].log_softmax(-1))
    assert torch.allclose(logits[1, 0], outputs.logits[1, 1].log_softmax(-1))
    for wrong in (lambda batch: batch["input_ids"][:, 0] > 0, lambda batch: batch["input_ids"]):
        with pytest.raises(BatchError, match=r"positions= gave .*\(batch, token\)"):
            predict(hook("llama", positions=wrong), batch)


def test_labels_without_a_prompt() -> None:
    hooked = hook("gpt2")
    batch = Prompts(hooked)(TEXTS)
    every = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    assert positions(predict(hooked, every)[1]).chosen.sum(1).tolist() == [4, 2]
    with pytest.raises(BatchError, match=r"example 0 has no prompt.*positions='last'"):
        hooked.task.real(hooked.sites[0], every, torch.zeros(2, 5, HIDDEN))
    classes = {**batch, "labels": torch.tensor([0, 1])}  # of another task
    assert predict(hooked, classes)[1].batch_shape == (2,)  # type: ignore[union-attr] # a Categorical
    assert hooked.task.targets(classes) is None


# Padding


@pytest.mark.parametrize("ends", [None, ENDS])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neo", "mistral", "gemma"])
def test_padding_on_either_side_changes_nothing(family: str, ends: Any) -> None:
    hooked = hook(family)
    batch = Prompts(hooked)(TEXTS, ends)

    def logits(given: dict[str, Tensor]) -> list[Tensor]:
        result = predict(hooked, given)[1]
        if isinstance(result, Positions):
            return [row[own] for row, own in zip(categorical(result.distribution).logits, result.chosen, strict=True)]
        return list(categorical(result).logits)

    right, turned = logits(batch), logits(left(batch))
    for row in (0, 1):
        (single,) = logits(alone(batch, row))
        assert torch.allclose(right[row], single, atol=1e-5)
        assert torch.allclose(turned[row], single, atol=1e-5)
    assert not torch.allclose(right[0][0], right[1][0], atol=1e-3)


def test_position_ids_that_are_given_stay() -> None:
    hooked = hook("gpt2")
    batch = left(Prompts(hooked)(TEXTS))
    own = {**batch, "position_ids": torch.arange(5).expand(2, 5)}
    assert torch.equal(hooked.task.arguments(hooked.model, own)[1]["position_ids"], own["position_ids"])
    found = hooked.task.arguments(hooked.model, batch)[1]["position_ids"]
    assert found.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert "position_ids" not in hooked.task.arguments(hooked.model, Prompts(hooked)(TEXTS))[1]


@pytest.mark.parametrize("ends", [None, ENDS])
def test_masks_are_the_same_whatever_the_padding(ends: Any) -> None:
    hooked = hook("gpt2")
    batch = Prompts(hooked)(TEXTS, ends)
    made = maskhooks.DiffMask(hooked, amortized=True, sites="input", recipe=Recipe(steps=4, baseline_steps=4))
    made.fit([batch], steps=8, progress=False)
    right, turned = (made.explain(given) for given in (batch, left(batch)))
    for row, length in ((0, 5), (1, 3)):
        scores, _, names = right.matrix(row)
        assert names == [CLS_NAME, *TEXTS[row].split()]
        assert scores.shape[1] == length
        assert torch.allclose(torch.tensor(scores), torch.tensor(turned.matrix(row)[0]), atol=1e-5)
        assert turned.matrix(row)[2] == names


CLS_NAME = "[CLS]"


# Encoder-decoders


def test_a_decoder_gets_its_labels_shifted_or_its_start() -> None:
    hooked = hook("t5")
    prompts = Prompts(hooked)
    whole = prompts(TEXTS, ENDS)
    usual = {key: value for key, value in whole.items() if not key.startswith("decoder")}
    given, found = (hooked.task.arguments(hooked.model, batch)[1] for batch in (whole, usual))
    assert torch.equal(given["decoder_input_ids"], found["decoder_input_ids"])
    assert torch.equal(kl(predict(hooked, whole)[1], predict(hooked, usual)[1]), torch.zeros(2))
    chosen = positions(predict(hooked, whole)[1]).chosen
    assert chosen.sum(1).tolist() == [3, 5]
    outputs, result = predict(hooked, prompts(TEXTS))
    assert outputs.logits.shape == (2, 1, WORDS)
    start = hooked.model(**prompts(TEXTS), decoder_input_ids=torch.zeros(2, 1, dtype=torch.long)).logits
    assert torch.allclose(outputs.logits, start, atol=1e-5)
    assert positions(result).chosen.shape == (2, 1)


# Masks of prompts


@pytest.mark.parametrize("ends", [None, ENDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_for_a_continuation(family: str, ends: Any) -> None:
    hooked = hook(family)
    weights = copy.deepcopy(hooked.model.state_dict())
    batch = Prompts(hooked)(TEXTS, ends)
    many = maskhooks.DiffMask(hooked, sites="input", recipe=Recipe(steps=4, baseline_steps=4))
    many.fit([batch, batch], steps=4, progress=False)
    one = maskhooks.DiffMask(hooked, sites="input", amortized=False, recipe=Recipe(steps=4))
    lengths = [6, 4] if family == "t5" else [5, 3]
    for explainer in (many, one):
        explanation = explainer.explain(batch)
        for row, length in enumerate(lengths):
            scores, _, names = explanation.matrix(row)
            assert scores.shape[1] == len(names) == length
            assert ((scores > 0) & (scores <= 1)).all()
        about = explanation.examples[0]
        assert about.get("target") == {True: "[CLS] word10 [SEP]", False: "word10"}[family == "t5"] if ends else True
        assert about["prediction"]
    assert hooked.model.training
    assert all(same_bits(weight, weights[name]) for name, weight in hooked.model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_the_prompt_closed_nothing_of_it_is_left(family: str) -> None:
    """The continuation stays readable: its tokens are never masked."""
    hooked = hook(family)
    batch = Prompts(hooked)(TEXTS, [[10, 11], [12, 13]])
    site = hooked.find("input")[0]
    real = hooked.task.real(site, batch, torch.zeros(2, 7, HIDDEN))

    def closed(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), hooked.tap(replace={site: lambda value: value.masked_fill(real[..., None], 0)}):
            return categorical(positions(hooked.distribution(hooked(given), given)).distribution).logits

    usual = closed(batch)
    prompt, end = (copy.deepcopy(batch) for _ in range(2))
    prompt["input_ids"][real] = 9
    assert same_bits(closed(prompt), usual)
    end["input_ids"][0, 5] = end["labels"][0, 5] = 20
    assert torch.equal(closed(end)[0, 0], usual[0, 0])
    assert not torch.allclose(closed(end)[0, 1], usual[0, 1])


# generate


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
        with pytest.raises(ReplacementError, match=r"a value of 2 tokens .* prompt's 5 were due.*prefill_chunk_size"):
            generate(hooked, batch, prefill_chunk_size=2)
        shorter = {key: value[:, 2:] for key, value in batch.items()}
        with pytest.raises(ReplacementError, match="a value of 3 tokens"):
            generate(hooked, shorter)
    single = {key: value[:, -1:] for key, value in batch.items()}
    with (
        hooked.tap(replace={hooked.sites[0]: OnPrompt(torch.zeros_like, 5)}),
        pytest.raises(ReplacementError, match="a value of 1 tokens"),
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


# Replay


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
    zeros = torch.zeros_like(clean.values[str(site)])
    with torch.no_grad():
        replayed = onward_pass(clean, {site: zeros})
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
