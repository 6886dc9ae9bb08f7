"""Continuations count and their prompts are masked, whatever the padding and the architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from maskhooks_transformers.prompts import Prompts
from torch import Tensor

import maskhooks
from maskhooks import Recipe
from maskhooks.errors import BatchError
from maskhooks.model.outputs import Positions, kl
from tests.adapters.transformers_models import HIDDEN, PAD, WORDS, tokenizer
from tests.adapters.transformers_predictions import categorical, positions, predict
from tests.adapters.transformers_prompts import ENDS, FAMILIES, TEXTS, alone, hook, left
from tests.conftest import same_bits


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
            valid = hooked.task.valid(
                site, given, value if family == "llama" or "hidden" in site.tags else value[..., :16]
            )
            assert torch.equal(valid, given["attention_mask"].bool() & (given["labels"] == -100)), site


def test_which_tokens_count_may_be_said() -> None:
    batch = Prompts(hook("llama"))(TEXTS, ENDS)
    outputs, last = predict(hook_like := hook("llama", positions="last"), batch)
    assert torch.allclose(categorical(last).logits, outputs.logits[[0, 1], [5, 5]].log_softmax(-1))
    assert hook_like.task.valid(hook_like.sites[0], batch, torch.zeros(2, 6, HIDDEN)).sum() == 12
    assert positions(predict(hook("llama", positions="all"), batch)[1]).chosen.sum(1).tolist() == [5, 5]
    named = hook("llama", positions=lambda batch: torch.isin(batch["input_ids"], torch.tensor([5, 7, 8, PAD])))
    outputs, result = predict(named, batch)
    assert positions(result).chosen.sum(1).tolist() == [2, 1]
    logits = categorical(positions(result).distribution).logits
    assert torch.allclose(logits[0], outputs.logits[0, [2, 4]].log_softmax(-1))
    assert torch.allclose(logits[1, 0], outputs.logits[1, 1].log_softmax(-1))
    for wrong in (lambda batch: batch["input_ids"][:, 0] > 0, lambda batch: batch["input_ids"]):
        with pytest.raises(BatchError, match=r"positions= returned .*\(batch, token\)"):
            predict(hook("llama", positions=wrong), batch)


def test_labels_without_a_prompt() -> None:
    hooked = hook("gpt2")
    batch = Prompts(hooked)(TEXTS)
    every = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    assert positions(predict(hooked, every)[1]).chosen.sum(1).tolist() == [4, 2]
    with pytest.raises(BatchError, match=r"example 0 has no prompt.*positions='last'"):
        hooked.task.valid(hooked.sites[0], every, torch.zeros(2, 5, HIDDEN))
    classes = {**batch, "labels": torch.tensor([0, 1])}  # of another task
    assert predict(hooked, classes)[1].batch_shape == (2,)  # type: ignore[union-attr] # a Categorical
    assert hooked.task.targets(classes) is None


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
        assert names == ["[CLS]", *TEXTS[row].split()]
        assert scores.shape[1] == length
        assert torch.allclose(torch.tensor(scores), torch.tensor(turned.matrix(row)[0]), atol=1e-5)
        assert turned.matrix(row)[2] == names


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
    with torch.no_grad():  # with gradients PyTorch multiplies in another order
        start = hooked.model(**prompts(TEXTS), decoder_input_ids=torch.zeros(2, 1, dtype=torch.long)).logits
    assert torch.allclose(outputs.logits, start)
    assert positions(result).chosen.shape == (2, 1)


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
        about = explanation.metadata[0]
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
    valid = hooked.task.valid(site, batch, torch.zeros(2, 7, HIDDEN))

    def closed(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), hooked.tap(replace={site: lambda value: value.masked_fill(valid[..., None], 0)}):
            return categorical(positions(hooked.distribution(hooked(given), given)).distribution).logits

    usual = closed(batch)
    prompt, end = (copy.deepcopy(batch) for _ in range(2))
    prompt["input_ids"][valid] = 9
    assert same_bits(closed(prompt), usual)
    end["input_ids"][0, 5] = end["labels"][0, 5] = 20
    assert torch.equal(closed(end)[0, 0], usual[0, 0])
    assert not torch.allclose(closed(end)[0, 1], usual[0, 1])
