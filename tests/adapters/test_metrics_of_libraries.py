"""Metrics of explanations by other libraries' methods, and of models of theirs: the operators that know tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast

import maskhooks
from maskhooks import Hooked
from maskhooks.errors import BatchError, SettingError
from maskhooks.metrics.judgement import judge
from tests.adapters.test_transformers_words import batch, tokenizer
from tests.adapters.transformers_models import make

__all__ = ["batch", "tokenizer"]  # fixtures

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)


def probabilities(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
    return found


@pytest.fixture
def hooked(tokenizer: PreTrainedTokenizerFast) -> Hooked:
    model = make("bert", "SequenceClassification")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # so that outputs move
    return maskhooks.wrap(model.eval(), tokenizer=tokenizer)


def texts(batch: BatchEncoding) -> list[list[int]]:
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [[index for index, valid in zip(*row, strict=True) if valid] for row in rows]


def shorter(tokenizer: PreTrainedTokenizerFast) -> BatchEncoding:
    return tokenizer(["[CLS] ungoodness films . [SEP]", "[CLS] films a [SEP]"], padding=True, return_tensors="pt")


@pytest.mark.parametrize("operator", ["mask", "delete"])
def test_tokens_are_masked_or_left_out_text_by_text(
    hooked: Hooked, tokenizer: PreTrainedTokenizerFast, operator: str
) -> None:
    batch = shorter(tokenizer)
    explanation = maskhooks.Random(hooked, "input").explain(batch)
    names = ["comprehensiveness", "sufficiency"]
    metrics = [{"name": name, "operator": operator} for name in names]
    more, less = judge(explanation, metrics, hooked=hooked, batches=[batch])
    for example, ids in enumerate(texts(batch)):
        rows = explanation.select(example=example)
        scores = rows["score"]
        assert len(scores) == len(ids)
        order = sorted(range(1, len(ids) - 1), key=lambda at, scores=scores: -scores[at])  # without [CLS] and [SEP]
        full = probabilities(hooked.model, ids)
        j, wanted = int(full.argmax()), [0.0, 0.0]
        for share in BINS:
            k = math.ceil(share * len(order))
            for which, removed in enumerate((order[:k], order[k:])):
                left = [tokenizer.mask_token_id if at in removed else index for at, index in enumerate(ids)]
                if operator == "delete":
                    left = [index for at, index in enumerate(ids) if at not in removed]
                wanted[which] += float(full[j] - probabilities(hooked.model, left)[j]) / 5
        assert [more.values[example], less.values[example]] == pytest.approx(wanted, abs=2e-5)


def test_tokens_are_left_out_on_the_side_of_padding() -> None:
    from maskhooks_transformers.inputs import without_tokens

    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    valid = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    removed = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 1, 0, 0]]).bool()
    found = without_tokens({"input_ids": ids, "attention_mask": valid, "position_ids": ids, "labels": ids}, removed)
    assert found["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert found["input_ids"][0, 1:].tolist() == [5, 7]
    assert found["input_ids"][1].tolist() == [2, 4, 5]
    assert found["labels"].tolist() == [[-100, 5, 7], [2, 4, 5]]
    assert "position_ids" not in found
    right = without_tokens({"input_ids": ids.flip(1), "attention_mask": valid.flip(1)}, removed.flip(1))
    assert right["attention_mask"].tolist() == found["attention_mask"].flip(1).tolist()
    assert right["input_ids"][1].tolist() == [5, 4, 2]
    assert without_tokens(ids, removed)["attention_mask"].sum(1).tolist() == [4, 3]
    with pytest.raises(BatchError, match="nothing is left of example 1"):
        without_tokens(ids, torch.tensor([[False] * 5, [True] * 5]))


def test_what_cannot_be_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = shorter(tokenizer)
    tagger = maskhooks.wrap(make("bert", "TokenClassification").eval(), tokenizer=tokenizer)
    explanation = maskhooks.Random(tagger, "input").explain(batch)
    metric = {"name": "morf", "operator": "delete"}
    with pytest.raises(SettingError, match="needs one prediction per example"):
        judge(explanation, metric, hooked=tagger, batches=[batch])
    hidden = maskhooks.Random(tagger, "bert.encoder.layer.1:output").explain(batch)
    with pytest.raises(SettingError, match="is not tagged as one"):
        judge(hidden, metric, hooked=tagger, batches=[batch])
    assert judge(hidden, "morf", hooked=tagger, batches=[batch])[0].undefined == 0  # of several predictions


def test_a_method_of_captum(hooked: Hooked, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("captum")
    from maskhooks_captum.gradients import IntegratedGradients

    batch = shorter(tokenizer)
    captum = IntegratedGradients(hooked, "input").explain(batch)
    ours = maskhooks.LeaveOneOut(hooked, "input").explain(batch)
    truth = [[index % 2 for index in range(len(ids))] for ids in texts(batch)]
    names = ["comprehensiveness", "sufficiency", "area-between", "auroc", "kendall", {"name": "js", "absolute": True}]
    found = judge(captum, names, hooked=hooked, batches=[batch], truth=truth, others=[ours])
    assert all(np.isfinite(one.values).all() for one in found)
    (kendall,) = judge(ours, "kendall", others=[captum])
    assert kendall.values.tolist() == pytest.approx(found[4].values.tolist())


def test_edges_of_graphs() -> None:
    geometric = pytest.importorskip("torch_geometric")
    from tests.adapters.geometric_models import Pooled, graph
    from tests.adapters.test_geometric_search import BONDS, PATH, pooled

    model = pooled(Pooled()).eval()
    graphs = geometric.data.Batch.from_data_list([graph(4, BONDS), graph(4, PATH)])
    hooked = maskhooks.wrap(model)
    site = hooked.find("message")[0]
    explanation = maskhooks.LeaveOneOut(hooked, site).explain(graphs)
    (whole,) = judge(explanation, "comprehensiveness", hooked=hooked, batches=[graphs])
    assert len(whole.values) == 2
    for number, alone in enumerate((graph(4, BONDS), graph(4, PATH))):
        one = geometric.data.Batch.from_data_list([alone])
        (found,) = judge(
            maskhooks.LeaveOneOut(hooked, site).explain(one), "comprehensiveness", hooked=hooked, batches=[one]
        )
        assert found.values[0] == pytest.approx(whole.values[number], abs=1e-5)
