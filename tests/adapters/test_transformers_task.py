"""How a batch becomes a call of a transformer; its positions, names, labels, and another input of the same shape."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from maskhooks_transformers.words import Words
from torch.distributions import Categorical

import maskhooks
from maskhooks.errors import BatchError, MaskhooksWarning
from tests.adapters.transformers_models import CLS, DECODERS, FIRST, HIDDEN, REAL, SEP, WORDS, batch, make, tokenizer
from tests.adapters.transformers_predictions import predict
from tests.conftest import same_bits
from tests.fresh_process import printed_by


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
    hooked = maskhooks.wrap(make("distilbert"))
    given = batch(token_type_ids=segments)
    assert "token_type_ids" not in hooked.task.arguments(hooked.model, given)[1]
    assert same_bits(predict(hooked, given)[0].logits, predict(hooked, batch())[0].logits)


def test_a_tensor_is_token_ids() -> None:
    hooked = maskhooks.wrap(make("bert"))
    ids = batch()["input_ids"][:1]
    assert same_bits(predict(hooked, ids)[0].logits, predict(hooked, {"input_ids": ids})[0].logits)
    assert hooked.task.perturb(ids, torch.Generator().manual_seed(0)).shape == ids.shape


def test_embeddings_instead_of_token_ids() -> None:
    hooked = maskhooks.wrap(make("bert"))
    embeds = hooked.model.get_input_embeddings()(batch()["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": batch()["attention_mask"]}
    assert same_bits(predict(hooked, given)[0].logits, predict(hooked, batch())[0].logits)
    assert hooked.task.names(hooked.sites[1], given) is None
    other = hooked.task.perturb(given, torch.Generator().manual_seed(0))
    assert other["inputs_embeds"].shape == embeds.shape
    assert torch.equal(other["inputs_embeds"][~REAL], embeds[~REAL])
    assert not torch.equal(other["inputs_embeds"], embeds)


def test_batches_that_cannot_be_called() -> None:
    hooked = maskhooks.wrap(make("bert"))
    with pytest.raises(BatchError, match=r"no input_ids or inputs_embeds; it has text, labels.*tokenizer"):
        hooked({"text": ["a"], "labels": torch.zeros(1)})
    with pytest.raises(BatchError, match=r"input_ids is not a tensor but a list.*return_tensors"):
        hooked({"input_ids": [[1, 2], [3]]})
    with pytest.raises(BatchError, match=r"it is a tuple.*call="):
        hooked((batch()["input_ids"], batch()["attention_mask"]))
    with pytest.raises(BatchError, match=r"input_ids has shape \[7\], without a batch axis"):
        hooked({"input_ids": batch()["input_ids"][0]})
    square = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(3, 1, 7, 7)}
    with pytest.raises(BatchError, match=r"attention_mask is of shape \[3, 1, 7, 7\].*valid="):
        hooked.task.valid(hooked.sites[0], square, torch.zeros(3, 7, HIDDEN))


def test_a_users_own_call_takes_any_batch() -> None:
    hooked = maskhooks.wrap(
        make("bert"),
        call=lambda model, pair: model(input_ids=pair[0], attention_mask=pair[1]),
        valid=lambda pair: pair[1],
    )
    pair = (batch()["input_ids"], batch()["attention_mask"])
    assert isinstance(predict(hooked, pair)[1], Categorical)
    assert torch.equal(hooked.task.valid(hooked.sites[0], pair, torch.zeros(3, 7, HIDDEN)), REAL)
    assert hooked.task.names(hooked.sites[0], pair) is None
    assert hooked.task.targets(pair) is None
    tokens = maskhooks.wrap(
        make("bert", "TokenClassification"),
        call=lambda model, pair: model(input_ids=pair[0], attention_mask=pair[1]),
    )
    with pytest.raises(BatchError, match=r"unknown which tokens.*valid="):
        predict(tokens, pair)


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
    assert torch.equal(hooked.task.valid(states, batch(), torch.zeros(3, 7, HIDDEN)), REAL)
    each = hooked.task.valid(whole, batch(), torch.zeros(3, 7, HIDDEN))
    assert torch.equal(each, REAL[..., None].expand(3, 7, HIDDEN))
    assert hooked.task.valid(pooled, batch(), torch.zeros(3, HIDDEN)).all()
    assert hooked.task.names(pooled, batch()) is None
    with pytest.raises(BatchError, match=r"\[3, 7\].*\[3, 9\]"):
        hooked.task.valid(states, batch(), torch.zeros(3, 9, HIDDEN))


def test_all_tokens_are_real_without_a_mask() -> None:
    hooked = maskhooks.wrap(make("bert"))
    ids = {"input_ids": batch()["input_ids"]}
    assert hooked.task.valid(hooked.sites[0], ids, torch.zeros(3, 7, HIDDEN)).all()


def test_tokens_are_called_by_the_tokenizer() -> None:
    words = tokenizer()
    given = words(["word5 word6 word7", "word9"], padding=True, return_tensors="pt")
    hooked = maskhooks.wrap(make("bert"), tokenizer=words, example=given)
    assert hooked.task.names(hooked.sites[2], given) == [
        ["[CLS]", "word5", "word6", "word7", "[SEP]"],
        ["[CLS]", "word9", "[SEP]", "[PAD]", "[PAD]"],
    ]
    assert isinstance(predict(hooked, given)[1], Categorical)
    other = hooked.task.perturb(given, torch.Generator().manual_seed(1))
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


@pytest.mark.parametrize("left", [False, True])
def test_another_input_keeps_special_tokens_and_padding(left: bool) -> None:
    hooked = maskhooks.wrap(make("bert"))
    given = batch(left=left, labels=torch.tensor([0, 1, 0]))
    before = copy.deepcopy(given)
    other = hooked.task.perturb(given, torch.Generator().manual_seed(0))
    assert all(torch.equal(given[key], before[key]) for key in before)
    assert all(torch.equal(other[key], given[key]) for key in given if key != "input_ids")
    special = given["input_ids"] < FIRST
    assert torch.equal(other["input_ids"][special], given["input_ids"][special])
    assert not torch.equal(other["input_ids"], given["input_ids"])
    assert sorted(other["input_ids"].flatten()) == sorted(given["input_ids"].flatten())


def test_no_other_input_where_nothing_can_change_places() -> None:
    hooked = maskhooks.wrap(make("bert"))
    generator = torch.Generator().manual_seed(0)
    assert hooked.task.perturb({"input_ids": torch.tensor([[CLS, 9, SEP]])}, generator) is None
    assert hooked.task.perturb({"input_ids": torch.tensor([[CLS, 9, 9, SEP]])}, generator) is None
    two = {"input_ids": torch.tensor([[CLS, 8, 9, SEP]])}
    for seed in range(4):  # half of all permutations of two leave them where they are
        other = hooked.task.perturb(two, torch.Generator().manual_seed(seed))
        assert other["input_ids"].tolist() == [[CLS, 9, 8, SEP]]


def test_the_plugin_is_light() -> None:
    code = (
        "import sys, maskhooks, torch\n"
        "hooked = maskhooks.wrap(torch.nn.Linear(2, 2), sites={':output': 'batch out -> batch'})\n"
        "print('maskhooks_transformers.plugin' in sys.modules, 'transformers' in sys.modules)\n"
        "from maskhooks_transformers.adapter import TransformersAdapter\n"
        "print(TransformersAdapter().types(), 'transformers' in sys.modules)\n"
    )
    assert printed_by(code).splitlines() == ["True False", "() False"]
