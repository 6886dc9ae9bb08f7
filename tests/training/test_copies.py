"""Copies: several samples of each example in one batch are several passes of it."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

import maskhooks
from maskhooks import DiffMask, Recipe
from maskhooks.errors import BatchError
from maskhooks.hooks.replay import Replay
from maskhooks.passes.clean import clean_pass
from maskhooks.seeds import generator
from maskhooks.training.copies import Copies
from maskhooks.training.per_example import begin, pathwise
from tests.masks.test_masking import TOKENS, Tagger
from tests.tiny_runs import categorical, padding
from tests.training.tagger_fits import SITES, batches, wrapped

COUNT = 200


def estimated(hooked, count):
    explainer = DiffMask(hooked, SITES[1], amortized=False, margin=0.1, recipe=Recipe(steps=2))
    problem, replay = explainer._problem(), Replay(hooked.model)
    (group,) = explainer.groups
    clean = clean_pass(hooked, batches(1)[0], group.reads, group.sites, replay)
    begin(group, clean)
    copies = Copies(pathwise, clean, group, count, replay)
    with contextlib.ExitStack() as held, torch.enable_grad():
        samples, divergence, penalty = copies(problem, group, generator(1), held)
        (penalty.sum() + samples.expected_l0.sum()).backward()
    (probe,) = (vote.probe for vote in group.maskings[0].votes)
    return samples, divergence, probe.logits.grad, copies


def test_one_batch_of_copies_is_as_good_as_many_passes():
    together, apart = (estimated(wrapped(select=select), COUNT) for select in (None, lambda batch, numbers: batch))
    assert together[3].copied is not None
    assert apart[3].copied is None
    torch.testing.assert_close(together[0].expected_l0, apart[0].expected_l0)
    torch.testing.assert_close(together[1], apart[1], rtol=0.3, atol=0.005)
    valid = batches(1)[0][1]
    one, other = (found[2][..., 0][valid] for found in (together, apart))
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.95


def test_copies_that_are_other_examples_are_refused():
    def wrong(batch, numbers):
        ids, valid = (part[torch.as_tensor(numbers)] for part in batch)
        return (ids + 1) % 11, valid

    with pytest.raises(BatchError, match=r"copies of the batch's examples have other values at layers\.0:output"):
        estimated(wrapped(select=wrong), 3)


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_logits_are_those_of_one_example_again():
    assert estimated(wrapped(), 4)[3].count == 4
    hooked = maskhooks.wrap(Tagger(), sites=dict.fromkeys(SITES, TOKENS), output=categorical, valid=padding)
    recipe = dataclasses.replace(Recipe(), steps=60, samples=4, logit_learning_rate=0.2)
    rows = DiffMask(hooked, SITES[1], amortized=False, margin=1e-4, recipe=recipe).explain(batches(1)[0])
    assert len(rows["score"]) == batches(1)[0][1].numel()
    assert rows["score"][rows["valid"]].std() > 0.01
