"""What transformers predict with each head, and options and outputs that do not fit one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal

import maskhooks
from maskhooks.errors import SettingError, UnknownDistributionError
from maskhooks.model.outputs import Positions, kl
from tests.adapters.transformers_models import (
    DECODERS,
    ENCODERS,
    HIDDEN,
    MASK,
    REAL,
    WORDS,
    batch,
    config,
    make,
    tokenizer,
)
from tests.adapters.transformers_predictions import categorical, positions, predict


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
    with pytest.raises(SettingError, match="'last', 'all' or a function"):
        maskhooks.wrap(make("llama", "CausalLM"), positions="first")
    with pytest.raises(SettingError, match="sequence classification"):
        maskhooks.wrap(make("bert"), positions="all")
    with pytest.raises(SettingError, match=r"no setting 'tokeniser'.*Did you mean 'tokenizer'"):
        maskhooks.wrap(make("bert"), tokeniser=tokenizer())
    with pytest.raises(SettingError, match=r"Give the tokenizer itself: AutoTokenizer\.from_pretrained\('gpt2'\)"):
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
    assert hooked.task.valid(encoder, both, torch.zeros(3, 7, HIDDEN)).sum(1).tolist() == [7, 4, 5]
    assert hooked.task.valid(decoder, both, torch.zeros(3, 4, HIDDEN)).sum(1).tolist() == [4, 3, 2]
    assert [len(row) for row in hooked.task.names(decoder, both) or ()] == [4, 4, 4]


def test_tuples_of_outputs() -> None:
    model = make("bert")
    usual = predict(maskhooks.wrap(model), batch())[1]
    model.config.return_dict = False
    outputs, result = predict(maskhooks.wrap(model), batch())
    assert isinstance(outputs, tuple)
    assert torch.equal(categorical(usual).logits, categorical(result).logits)
