"""Training in bfloat16 on a small BERT: masks learn, gates stay float32, and what is measured later is float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.masks.masking import Masked, Masking

QUICK = dataclasses.replace(Recipe(), steps=15, validations=3, warmup_steps=5)


def bert() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than initialised, so that predictions differ
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def batches(count: int) -> list[dict[str, Any]]:
    source = torch.Generator().manual_seed(count)
    valid = (torch.arange(12) < torch.randint(4, 13, (count, 8, 1), generator=source)).long()
    ids = torch.randint(5, 50, (count, 8, 12), generator=source)
    return [{"input_ids": one, "attention_mask": mask} for one, mask in zip(ids, valid, strict=True)]


@pytest.mark.parametrize("sites", ["hidden", "input"])
@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, sites: str) -> None:
    found: list[tuple[bool, torch.dtype]] = []
    plain, votes = Masking.__call__, Masking._vote

    def seen(masking: Masking, *args: Any, **settings: Any) -> Masked:
        masked = plain(masking, *args, **settings)
        assert masked.sample.dtype == masked.log_open.dtype == torch.float32
        assert masked.replaced.dtype == masked.original.dtype
        return masked

    def voted(masking: Masking, *args: Any) -> Any:
        logits = votes(masking, *args)
        found.append((torch.is_autocast_enabled("cpu"), logits.dtype))
        return logits

    monkeypatch.setattr(Masking, "__call__", seen)
    monkeypatch.setattr(Masking, "_vote", voted)
    fitted, model = [], bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for precision in ("bf16-mixed", None):
        recipe = dataclasses.replace(QUICK, baseline_steps=5)
        made = DiffMask(maskhooks.wrap(model), sites, margin=0.05, recipe=recipe)
        made.fit(batches(4), batches(2), steps=60, progress=False, accelerator="cpu", precision=precision)
        fitted.append(made)
        if precision:
            assert {dtype for _, dtype in found} == {torch.float32}
            assert any(autocast for autocast, _ in found)
        found.clear()
        made.explain(batches(2)[0])
        made.evaluate(batches(2), progress=False)
        assert set(found) == {(False, torch.float32)}
    half, whole = ([row["expected_l0"] for row in made.result.log] for made in fitted)
    assert sum(half[-10:]) < sum(half[:10])  # it learns
    assert half == pytest.approx(whole, abs=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
