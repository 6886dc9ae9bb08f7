"""What maskings do to a set: several samples of the gates where it is small, one where it is not."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.group import MaskingGroup, reads_of
from maskhooks.masks.masking import Masking
from maskhooks.masks.probes import MLP
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import kl
from maskhooks.model.wrapping import wrap
from maskhooks.passes.clean import clean_pass
from maskhooks.seeds import generator
from maskhooks.training import evaluation
from maskhooks.training.evaluation import Evaluation, Measure, draws_for
from maskhooks.training.preparation import gather
from tests.masks.test_masking import TOKENS, Tagger

Batch = tuple[Tensor, Tensor]
source = partial(generator, 7)


def batches(count: int, size: int) -> list[tuple[int, Batch]]:
    random = generator(1)
    valid = torch.ones(size, 6, dtype=torch.bool)
    return [(number, (torch.randint(0, 11, (size, 6), generator=random), valid)) for number in range(count)]


@pytest.fixture
def hooked() -> Hooked:
    sites = dict.fromkeys(["layers.0:output", "layers.1:output"], TOKENS)
    return wrap(Tagger(), sites=sites, output=lambda out: Categorical(logits=3 * out), valid=lambda batch: batch[1])


@pytest.fixture
def groups(hooked: Hooked) -> list[MaskingGroup]:
    torch.manual_seed(0)
    found = [
        Masking(site, depth, [Vote((site,), MLP(init_logit=0.0))], HardConcrete(), Learned())
        for depth, site in enumerate(hooked.sites)
    ]
    gather(hooked, found, [batches(1, 8)[0][1]], torch.device("cpu"))
    return [MaskingGroup([masking]) for masking in found]


def one_draw(hooked: Hooked, groups: list[MaskingGroup], given: Any, *draw: int) -> list[dict[str, Any]]:
    """What a single sample of the gates does."""
    measures = [Measure(group, rounded=not draw) for group in groups]
    for number, batch in given:
        clean = clean_pass(hooked, batch, reads_of(groups))
        for index, measure in enumerate(measures):
            measure.add(clean, kl, source(number, index, *draw))
    return [measure.row() for measure in measures]


def test_how_many_draws() -> None:
    assert [draws_for(count) for count in (1, 31, 32, 100, 250, 499, 500, 10_000)] == [16, 16, 16, 5, 2, 2, 1, 1]
    assert [draws_for(32, most) for most in (0, 3, 99)] == [1, 3, 16]


def test_a_small_set_has_the_mean_of_several_draws(hooked: Hooked, groups: list[MaskingGroup]) -> None:
    given = batches(2, 50)
    found = Evaluation(hooked, groups, kl, source, rounded=True)
    rows = found.rows(given)
    assert found.draws == 5
    draws = [one_draw(hooked, groups, given, *([draw] if draw else [])) for draw in range(5)]
    for row, *singles in zip(rows, *draws, strict=True):
        for name in ("divergence", "expected_l0", "agreement"):
            assert row[name] == pytest.approx(statistics.mean(single[name] for single in singles))
        assert len({single["divergence"] for single in singles}) == 5
        for name in ("site", "depth", "rounded_divergence", "rounded_kept", "rounded_agreement"):
            assert row[name] == singles[0][name]
    assert found.rows(iter(given)) == rows


def test_a_large_set_has_the_draw_that_it_had(
    hooked: Hooked, groups: list[MaskingGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batches(3, 20)
    monkeypatch.setattr(evaluation, "ENOUGH", 60)
    found = Evaluation(hooked, groups, kl, source, rounded=True)
    assert found.rows(given) == one_draw(hooked, groups, given)
    assert found.draws == 1


def test_batches_pass_the_model_once(hooked: Hooked, groups: list[MaskingGroup]) -> None:
    """But for the set's first time, when it is not known yet how many there are."""
    calls = []
    hooked.model.head.register_forward_hook(lambda *_: calls.append(1))
    found = Evaluation(hooked, groups, kl, source)
    counts = []
    for _ in range(2):
        calls.clear()
        found.rows(batches(2, 100))
        counts.append(len(calls))
    masked = 3 * 2 * 2  # draws, batches, groups
    assert counts == [masked + 2 + 2, masked + 2]


def test_no_more_passes_than_there_is_time_for(hooked: Hooked, groups: list[MaskingGroup]) -> None:
    found = Evaluation(hooked, groups, kl, source, passes=13)
    found.rows(batches(2, 8))  # four passes a draw
    assert found.draws == 3


def test_the_spread_falls(hooked: Hooked, groups: list[MaskingGroup]) -> None:
    """Of ten evaluations, each with samples of its own."""
    few, many = [], []
    for seed in range(10):
        own = partial(generator, seed)
        many.append(Evaluation(hooked, groups, kl, own).rows(batches(1, 16))[0]["divergence"])
        few.append(Evaluation(hooked, groups, kl, own, passes=1).rows(batches(1, 16))[0]["divergence"])
    assert statistics.stdev(many) < 0.5 * statistics.stdev(few)
