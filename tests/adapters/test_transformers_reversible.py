"""Reformer: reversible layers have states while tapped, with the gradients of their own backward, and are put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import ReformerConfig, ReformerForSequenceClassification
from transformers.models.reformer import modeling_reformer

import maskhooks
from maskhooks import DiffMask, Hooked
from maskhooks.errors import BypassedWarning
from maskhooks.hooks.frozen import frozen
from maskhooks.masks.mix import mix
from tests.conftest import same_bits

SIZES = {"vocab_size": 40, "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
PARTS = {"feed_forward_size": 32, "attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 0}
PLACES = {"axial_pos_embds_dim": [8, 8], "axial_pos_shape": [4, 4]}
CHUNKS = {"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4}


@pytest.fixture
def hooked() -> Hooked:
    no_dropout = {"hidden_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0}
    config = ReformerConfig(
        **SIZES, **PARTS, **PLACES, **CHUNKS, **no_dropout, local_attention_probs_dropout_prob=0.0, is_decoder=False
    )
    return maskhooks.wrap(ReformerForSequenceClassification(config))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_open_gates_change_no_bit_and_all_is_put_back(hooked: Hooked) -> None:
    with torch.no_grad(), frozen(hooked.model):
        clean = hooked(batch()).logits
    sites = hooked.sites.tagged("hidden")
    assert len(sites) == 4
    with hooked.tap(read=sites), hooked.tap(replace={site: lambda value: value + 0 for site in sites}):
        inner = hooked(batch()).logits
        assert modeling_reformer.torch is not torch
    assert same_bits(inner, clean)
    with pytest.raises(ZeroDivisionError), hooked.tap(replace={sites[2]: lambda value: value / (1 // 0)}):
        hooked(batch())
    assert modeling_reformer.torch is torch
    assert "apply" not in vars(modeling_reformer._ReversibleFunction)


def test_gradients_are_those_of_its_own_backward(hooked: Hooked) -> None:
    table = hooked.model.get_input_embeddings().weight
    hooked.model.train()  # as it asks for, to compute its states once more
    (own,) = torch.autograd.grad(hooked(batch()).logits.pow(2).sum(), [table])
    words, leaf = hooked.sites.tagged("input")[0], table[batch()["input_ids"]].detach().requires_grad_()
    with hooked.tap(replace={words: lambda value: leaf}):
        hooked(batch()).logits.pow(2).sum().backward()
    found = torch.zeros_like(table).index_put_((batch()["input_ids"],), leaf.grad, accumulate=True)
    torch.testing.assert_close(found, own)


def test_closed_states_take_no_gradient_and_masks_learn(hooked: Hooked) -> None:
    for site in hooked.sites.tagged("hidden"):
        for sample, stopped in ((1.0, False), (0.0, True)):
            leaves: list[Tensor] = []

            def replaced(value: Tensor, sample: float = sample, leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(value.detach().clone().requires_grad_())
                return mix(leaves[-1], torch.tensor(sample), torch.ones_like(value).requires_grad_())

            with hooked.tap(replace={site: replaced}):
                hooked(batch()).logits.pow(2).sum().backward()
            assert leaves[0].grad is not None
            assert bool(leaves[0].grad.count_nonzero()) is not stopped
    explainer = DiffMask(hooked, "hidden", margin=0.5)
    with pytest.warns(BypassedWarning, match="layers.0:input"):  # of two streams of states each goes around the other
        explainer.fit([batch()], steps=2, progress=False)
    assert len(explainer.explain(batch())) >= 2 * 16 * 4
