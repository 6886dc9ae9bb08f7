"""Calls, distributions, names, labels and other inputs for transformers with every head."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from maskhooks_transformers.words import Words
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal
from transformers import PreTrainedTokenizerFast

import maskhooks
from maskhooks import Hooked
from maskhooks.errors import BatchError, MaskhooksWarning, SettingError, UnknownDistributionError
from maskhooks.model.outputs import Outputs, Positions, kl
from tests.adapters.transformers_models import (
    CLS,
    DECODERS,
    ENCODERS,
    FIRST,
    HIDDEN,
    MASK,
    PAD,
    SEP,
    WORDS,
    batch,
    config,
    make,
)
from tests.conftest import same_bits

REAL = batch()["attention_mask"].bool()


def predict(hooked: Hooked, given: Any) -> tuple[Any, Outputs]:
    hooked.model.eval()
    with torch.no_grad():
        outputs = hooked(given)
        return outputs, hooked.distribution(outputs, given)


def categorical(part: object) -> Categorical:
    assert isinstance(part, Categorical)
    return part


def positions(part: object) -> Positions:
    assert isinstance(part, Positions)
    return part


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}
    words = {f"word{index}": index for index in range(FIRST, WORDS)}
    inner = Tokenizer(WordLevel({**special, **words}, unk_token="[MASK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


# What each head predicts


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_one_label(family: str) -> None:
    hooked = maskhooks.wrap(make(family, num_labels=5))
    outputs, result = predict(hooked, batch())
    assert torch.allclose(categorical(result).probs, outputs.logits.softmax(-1))
    assert result.batch_shape == (3,)
    assert torch.equal(kl(result, result), torch.zeros(3))


def test_several_labels_by_problem_type_or_by_the_labels_themselves() -> None:
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    hooked = maskhooks.wrap(make("bert", num_labels=3, problem_type="multi_label_classification"))
    outputs, result = predict(hooked, batch())
    assert isinstance(result, Bernoulli)
    assert torch.equal(result.logits, outputs.logits)
    unset = maskhooks.wrap(make("bert", num_labels=3))
    assert isinstance(predict(unset, batch(labels=several))[1], Bernoulli)
    assert isinstance(predict(unset, batch(labels=torch.tensor([0, 1, 2])))[1], Categorical)
    assert unset.task.targets(batch(labels=several)) == ["LABEL_0, LABEL_2", "", "LABEL_1"]


def test_a_number() -> None:
    hooked = maskhooks.wrap(make("bert", num_labels=1))
    outputs, result = predict(hooked, batch())
    assert isinstance(result, Normal)
    assert torch.equal(result.mean, outputs.logits[:, 0])
    assert torch.equal(result.stddev, torch.ones(3))
    assert hooked.task.targets(batch(labels=torch.tensor([0.5, 2.0, -1.0]))) == ["0.5", "2", "-1"]


def test_several_numbers() -> None:
    hooked = maskhooks.wrap(make("bert", num_labels=2, problem_type="regression"))
    assert predict(hooked, batch())[1].batch_shape == (3, 2)  # type: ignore[union-attr] # a Normal


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "gpt2", "llama"]
)
def test_a_label_at_each_token(family: str) -> None:
    hooked = maskhooks.wrap(make(family, "TokenClassification", num_labels=4))
    outputs, result = predict(hooked, batch())
    assert torch.equal(positions(result).chosen, REAL)
    probabilities = categorical(positions(result).distribution).probs
    assert torch.allclose(probabilities, outputs.logits.softmax(-1))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "albert", "gpt2", "llama"])
def test_where_the_answer_starts_and_ends(family: str, left: bool) -> None:
    hooked = maskhooks.wrap(make(family, "QuestionAnswering"))
    outputs, result = predict(hooked, batch(left=left))
    assert isinstance(result, dict)
    padding = ~batch(left=left)["attention_mask"].bool()
    for name, logits in (("start", outputs.start_logits), ("end", outputs.end_logits)):
        part = categorical(result[name])
        assert part.probs[padding].eq(0).all()
        assert torch.allclose(part.probs, logits.masked_fill(padding, -torch.inf).softmax(-1))
        assert part.logits.isfinite().all()
    assert torch.equal(kl(result, result), torch.zeros(3))
    ends = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 2, 4])}
    assert hooked.task.targets(batch(**ends)) == ["start: 1, end: 2", "start: 2, end: 2", "start: 3, end: 4"]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert"])
def test_masked_language_models_predict_where_it_counts(family: str) -> None:
    hooked = maskhooks.wrap(make(family, "MaskedLM"), tokenizer=tokenizer())

    def check(given: dict[str, Tensor], counted: list[list[int]]) -> None:
        outputs, result = predict(hooked, given)
        chosen = positions(result).chosen
        probabilities = categorical(positions(result).distribution).probs
        for row, expected in enumerate(counted):
            own = outputs.logits[row, expected].softmax(-1)
            assert torch.allclose(probabilities[row][chosen[row]], own)

    every = [list(range(7)), list(range(4)), list(range(5))]
    check(batch(), every)
    ids = batch()["input_ids"]
    ids[0, 3] = ids[1, 1] = ids[1, 2] = MASK
    masked = {**batch(), "input_ids": ids}
    check(masked, [[3], [1, 2], every[2]])
    labels = torch.full((3, 7), -100)
    labels[0, 5] = labels[2, 1] = 9
    check({**masked, "labels": labels}, [[5], [1, 2], [1]])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_the_next_token(family: str, left: bool) -> None:
    hooked = maskhooks.wrap(make(family, "CausalLM"), tokenizer=tokenizer())
    outputs, result = predict(hooked, batch(left=left))
    last = torch.tensor([6, 6, 6] if left else [6, 3, 4])
    assert torch.allclose(categorical(result).probs, outputs.logits[torch.arange(3), last].softmax(-1))
    best = outputs.logits[torch.arange(3), last].argmax(-1)
    assert hooked.task.predictions(result) == tokenizer().convert_ids_to_tokens(best.tolist())


@pytest.mark.parametrize("left", [False, True])
def test_every_next_token(left: bool) -> None:
    hooked = maskhooks.wrap(make("llama", "CausalLM"), positions="all")
    outputs, result = predict(hooked, batch(left=left))
    chosen = positions(result).chosen
    assert chosen.sum(1).tolist() == [6, 3, 4]
    for row, length in enumerate((7, 4, 5)):
        start = 7 - length if left else 0
        expected = outputs.logits[row, start : start + length - 1].softmax(-1)
        assert torch.allclose(categorical(positions(result).distribution).probs[row][chosen[row]], expected)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(SettingError, match="'last' or 'all'"):
        maskhooks.wrap(make("llama", "CausalLM"), positions="first")
    with pytest.raises(SettingError, match="sequence classification"):
        maskhooks.wrap(make("bert"), positions="all")
    with pytest.raises(BatchError, match=r"takes no tokeniser.*tokenizer"):
        maskhooks.wrap(make("bert"), tokeniser=tokenizer())
    with pytest.raises(SettingError, match=r"give the tokenizer itself, AutoTokenizer\.from_pretrained\('gpt2'\)"):
        maskhooks.wrap(make("bert"), tokenizer="gpt2")


def test_a_subclass_has_the_head_of_its_parent() -> None:
    from transformers import BertForSequenceClassification

    class Own(BertForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    hooked = maskhooks.wrap(Own(config("bert")))
    given = {**batch(), "idx": torch.arange(3), "labels": torch.zeros(3, dtype=torch.long)}
    outputs, result = predict(hooked, given)
    assert isinstance(result, Categorical)
    assert outputs.loss is None


def test_outputs_without_a_known_distribution() -> None:
    hooked = maskhooks.wrap(make("bert", "Model"))
    with pytest.raises(UnknownDistributionError, match=r"BertModel.*AutoModelForSequenceClassification.*output="):
        predict(hooked, batch())
    headed = maskhooks.wrap(make("bert"))
    with pytest.raises(UnknownDistributionError, match="no logits, only: other"):
        headed.distribution({"other": torch.zeros(3)}, batch())
    own = maskhooks.wrap(make("bert", "Model"), output=lambda outputs: Categorical(logits=outputs.pooler_output))
    assert isinstance(predict(own, batch())[1], Categorical)


def test_an_encoder_decoder_predicts_each_target_token() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    small = {"d_model": HIDDEN, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": WORDS}
    model = BartForConditionalGeneration(BartConfig(**sizes, **small, max_position_embeddings=24))
    hooked = maskhooks.wrap(model)
    assert hooked.task.name == "transformers (sequence to sequence language model)"
    target = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0], [1, 5, 0, 0]])
    both = {**batch(), "decoder_input_ids": target, "decoder_attention_mask": (target != 0).long()}
    result = predict(hooked, both)[1]
    assert isinstance(result, Positions)
    assert result.chosen.sum(1).tolist() == [4, 3, 2]
    labelled = predict(hooked, {**both, "labels": torch.tensor([[5, -100, 7, 3], [8, 9, 3, -100], [5, 3, -100, -100]])})
    assert labelled[1].chosen.sum(1).tolist() == [3, 3, 2]
    encoder, decoder = (hooked.sites.tagged(side)[0] for side in ("encoder", "decoder"))
    assert hooked.task.real(encoder, both, torch.zeros(3, 7, HIDDEN)).sum(1).tolist() == [7, 4, 5]
    assert hooked.task.real(decoder, both, torch.zeros(3, 4, HIDDEN)).sum(1).tolist() == [4, 3, 2]
    assert [len(row) for row in hooked.task.names(decoder, both) or ()] == [4, 4, 4]


def test_tuples_of_outputs() -> None:
    model = make("bert")
    usual = predict(maskhooks.wrap(model), batch())[1]
    model.config.return_dict = False
    outputs, result = predict(maskhooks.wrap(model), batch())
    assert isinstance(outputs, tuple)
    assert torch.equal(categorical(usual).logits, categorical(result).logits)


# How a batch becomes a call


def test_labels_and_unknown_keys_stay_out_of_the_call() -> None:
    hooked = maskhooks.wrap(make("bert"))
    more = {"labels": torch.tensor([0, 1, 0]), "label": torch.tensor([0, 1, 0]), "idx": torch.arange(3)}
    _, kwargs = hooked.task.arguments(hooked.model, batch(**more, text=["a", "b", "c"], token_type_ids=None))
    assert set(kwargs) == {"input_ids", "attention_mask", "use_cache"}
    model = make("bert", "QuestionAnswering")
    ends = {"start_positions": torch.zeros(3), "end_positions": torch.zeros(3)}
    assert set(maskhooks.wrap(model).task.arguments(model, batch(**ends))[1]) == {
        "input_ids",
        "attention_mask",
        "use_cache",
    }


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("head", ["SequenceClassification", "CausalLM"])
def test_no_cache_is_written(family: str, head: str) -> None:
    assert predict(maskhooks.wrap(make(family, head)), batch())[0].past_key_values is None


def test_token_type_ids_are_dropped_where_the_model_has_none() -> None:
    segments = torch.zeros(3, 7, dtype=torch.long)
    predict(maskhooks.wrap(make("distilbert")), batch(token_type_ids=segments))


def test_a_tensor_is_token_ids() -> None:
    hooked = maskhooks.wrap(make("bert"))
    ids = batch()["input_ids"][:1]
    assert same_bits(predict(hooked, ids)[0].logits, predict(hooked, {"input_ids": ids})[0].logits)
    assert hooked.task.vary(ids, torch.Generator().manual_seed(0)).shape == ids.shape


def test_embeddings_instead_of_token_ids() -> None:
    hooked = maskhooks.wrap(make("bert"))
    embeds = hooked.model.get_input_embeddings()(batch()["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": batch()["attention_mask"]}
    assert same_bits(predict(hooked, given)[0].logits, predict(hooked, batch())[0].logits)
    assert hooked.task.names(hooked.sites[1], given) is None
    other = hooked.task.vary(given, torch.Generator().manual_seed(0))
    assert other["inputs_embeds"].shape == embeds.shape
    assert torch.equal(other["inputs_embeds"][~REAL], embeds[~REAL])
    assert not torch.equal(other["inputs_embeds"], embeds)


def test_batches_that_cannot_be_called() -> None:
    hooked = maskhooks.wrap(make("bert"))
    with pytest.raises(BatchError, match=r"no input_ids or inputs_embeds; it has text, labels.*tokenizer"):
        hooked({"text": ["a"], "labels": torch.zeros(1)})
    with pytest.raises(BatchError, match=r"input_ids is no tensor but a list.*return_tensors"):
        hooked({"input_ids": [[1, 2], [3]]})
    with pytest.raises(BatchError, match=r"it is a tuple.*call="):
        hooked((batch()["input_ids"], batch()["attention_mask"]))
    with pytest.raises(BatchError, match=r"input_ids has shape \[7\], without an axis for examples"):
        hooked({"input_ids": batch()["input_ids"][0]})
    square = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(3, 1, 7, 7)}
    with pytest.raises(BatchError, match=r"attention_mask is of shape \[3, 1, 7, 7\].*real="):
        hooked.task.real(hooked.sites[0], square, torch.zeros(3, 7, HIDDEN))


def test_a_users_own_call_takes_any_batch() -> None:
    hooked = maskhooks.wrap(
        make("bert"),
        call=lambda model, pair: model(input_ids=pair[0], attention_mask=pair[1]),
        real=lambda pair: pair[1],
    )
    pair = (batch()["input_ids"], batch()["attention_mask"])
    assert isinstance(predict(hooked, pair)[1], Categorical)
    assert torch.equal(hooked.task.real(hooked.sites[0], pair, torch.zeros(3, 7, HIDDEN)), REAL)
    assert hooked.task.names(hooked.sites[0], pair) is None
    assert hooked.task.targets(pair) is None
    tokens = maskhooks.wrap(
        make("bert", "TokenClassification"),
        call=lambda model, pair: model(input_ids=pair[0], attention_mask=pair[1]),
    )
    with pytest.raises(BatchError, match=r"real is not known.*real="):
        predict(tokens, pair)


# Positions


def test_real_positions_by_the_pattern_of_a_site() -> None:
    model = make("bert")
    hooked = maskhooks.wrap(
        model,
        sites={
            "bert.encoder.layer.0:output": "batch token hidden -> batch token",
            "bert.encoder.layer.1:output": "batch token hidden -> batch token hidden",
            "bert.pooler:output": "batch hidden -> batch",
        },
    )
    states, whole, pooled = hooked.sites
    assert torch.equal(hooked.task.real(states, batch(), torch.zeros(3, 7, HIDDEN)), REAL)
    each = hooked.task.real(whole, batch(), torch.zeros(3, 7, HIDDEN))
    assert torch.equal(each, REAL[..., None].expand(3, 7, HIDDEN))
    assert hooked.task.real(pooled, batch(), torch.zeros(3, HIDDEN)).all()
    assert hooked.task.names(pooled, batch()) is None
    with pytest.raises(BatchError, match=r"\[3, 7\].*\[3, 9\]"):
        hooked.task.real(states, batch(), torch.zeros(3, 9, HIDDEN))


def test_all_tokens_are_real_without_a_mask() -> None:
    hooked = maskhooks.wrap(make("bert"))
    ids = {"input_ids": batch()["input_ids"]}
    assert hooked.task.real(hooked.sites[0], ids, torch.zeros(3, 7, HIDDEN)).all()


def test_tokens_are_called_by_the_tokenizer() -> None:
    words = tokenizer()
    given = words(["word5 word6 word7", "word9"], padding=True, return_tensors="pt")
    hooked = maskhooks.wrap(make("bert"), tokenizer=words, example=given)
    assert hooked.task.names(hooked.sites[2], given) == [
        ["[CLS]", "word5", "word6", "word7", "[SEP]"],
        ["[CLS]", "word9", "[SEP]", "[PAD]", "[PAD]"],
    ]
    assert isinstance(predict(hooked, given)[1], Categorical)
    other = hooked.task.vary(given, torch.Generator().manual_seed(1))
    assert type(other) is type(given)
    assert sorted(other["input_ids"].flatten().tolist()) == sorted(given["input_ids"].flatten().tolist())


def test_tokens_are_called_by_their_ids_without_a_tokenizer() -> None:
    hooked = maskhooks.wrap(make("bert"))
    expected = [[str(index) for index in row] for row in batch()["input_ids"].tolist()]
    assert hooked.task.names(hooked.sites[0], batch()) == expected


def test_the_tokenizer_saved_with_a_model_is_found(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    from transformers import AutoModelForSequenceClassification

    without = maskhooks.wrap(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    assert without.task.names(without.sites[0], batch())[0][0] == str(CLS)  # type: ignore[index] # not None
    tokenizer().save_pretrained(tmp_path)
    hooked = maskhooks.wrap(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    assert hooked.task.names(hooked.sites[0], batch())[0][0] == "[CLS]"  # type: ignore[index] # not None


def test_a_broken_tokenizer_beside_a_model_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    words = Words(SimpleNamespace(_name_or_path=str(tmp_path)))
    with pytest.warns(MaskhooksWarning, match=r"cannot be loaded \(KeyError: .* wrap\(model, tokenizer=") as told:
        assert [words.tokens([1, 2]), words.tokens([3])] == [["1", "2"], ["3"]]
    assert len(told) == 1


def test_ids_beyond_the_tokenizer_are_numbers() -> None:
    hooked = maskhooks.wrap(make("bert"), tokenizer=tokenizer())
    given = {"input_ids": torch.tensor([[CLS, WORDS + 7, SEP]])}
    assert hooked.task.names(hooked.sites[0], given) == [["[CLS]", str(WORDS + 7), "[SEP]"]]


# Labels in words


def test_labels_in_words() -> None:
    named = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    hooked = maskhooks.wrap(make("bert", **named))
    assert hooked.task.targets(batch(labels=torch.tensor([1, 0, 1]))) == ["good", "bad", "good"]
    assert hooked.task.targets({**batch(), "label": [0, 1, 1]}) == ["bad", "good", "good"]
    assert hooked.task.targets(batch()) is None
    outputs, result = predict(hooked, batch())
    assert hooked.task.predictions(result) == [["bad", "good"][i] for i in outputs.logits.argmax(-1)]
    tokens = maskhooks.wrap(make("bert", "TokenClassification", **named))
    given = torch.full((3, 7), -100)
    given[0, :2], given[1, 3] = torch.tensor([1, 0]), 1
    assert tokens.task.targets(batch(labels=given)) == ["good bad", "good", ""]


# Another input of the same shape


@pytest.mark.parametrize("left", [False, True])
def test_another_input_keeps_special_tokens_and_padding(left: bool) -> None:
    hooked = maskhooks.wrap(make("bert"))
    given = batch(left=left, labels=torch.tensor([0, 1, 0]))
    before = copy.deepcopy(given)
    other = hooked.task.vary(given, torch.Generator().manual_seed(0))
    assert all(torch.equal(given[key], before[key]) for key in before)
    assert all(torch.equal(other[key], given[key]) for key in given if key != "input_ids")
    special = given["input_ids"] < FIRST
    assert torch.equal(other["input_ids"][special], given["input_ids"][special])
    assert not torch.equal(other["input_ids"], given["input_ids"])
    assert sorted(other["input_ids"].flatten()) == sorted(given["input_ids"].flatten())


def test_no_other_input_where_nothing_can_change_places() -> None:
    hooked = maskhooks.wrap(make("bert"))
    generator = torch.Generator().manual_seed(0)
    assert hooked.task.vary({"input_ids": torch.tensor([[CLS, 9, SEP]])}, generator) is None
    assert hooked.task.vary({"input_ids": torch.tensor([[CLS, 9, 9, SEP]])}, generator) is None
    two = {"input_ids": torch.tensor([[CLS, 8, 9, SEP]])}
    for seed in range(4):  # half of all permutations of two leave them where they are
        other = hooked.task.vary(two, torch.Generator().manual_seed(seed))
        assert other["input_ids"].tolist() == [[CLS, 9, 8, SEP]]


# What importing costs


def test_the_plugin_is_light() -> None:
    code = (
        "import sys, maskhooks, torch\n"
        "hooked = maskhooks.wrap(torch.nn.Linear(2, 2), sites={':output': 'batch out -> batch'})\n"
        "assert 'maskhooks_transformers.plugin' in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
        "from maskhooks_transformers.adapter import TransformersAdapter\n"
        "assert TransformersAdapter().types() == ()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
