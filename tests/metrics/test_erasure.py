"""Metrics by erasure, against loops over examples and positions that run a copy of the model by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Explanation
from maskhooks.errors import MaskhooksError, SettingError
from maskhooks.explanations.explanation import Scores
from maskhooks.masks.baselines import Token
from maskhooks.metrics.erasure import AOPC, CurveMetric, curves
from maskhooks.metrics.evidence import Evidence
from maskhooks.metrics.judgement import judge
from maskhooks.metrics.metric import METRICS
from maskhooks.plugins.registry import registry
from tests.conftest import fingerprint
from tests.metrics import small

NAMES = ("comprehensiveness", "sufficiency", "aopc", "morf", "lerf", "area-between", "log-odds", "divergence")
BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
Without = Callable[[Sequence[int]], Tensor]


def slow(name: str, without: Without, order: Sequence[int], steps: int = 10) -> float:
    """A metric of one example from its definition.

    Args:
        without: the classes' probabilities without some positions.
        order: the positions that count, the highest score first.
    """
    full, n = without([]), len(order)
    j = int(full.argmax())

    def top(share: float) -> list[int]:
        return list(order[: math.ceil(round(share * n, 9))])

    def rest(share: float) -> list[int]:
        return list(order[math.ceil(round(share * n, 9)) :])

    if name == "comprehensiveness":
        return sum(float(full[j] - without(top(share))[j]) for share in BINS) / 5
    if name == "sufficiency":
        return sum(float(full[j] - without(rest(share))[j]) for share in BINS) / 5
    if name == "log-odds":
        return float(without(top(0.2))[j].log() - full[j].log())
    if name == "divergence":
        return float((full * (full.log() - without(rest(0.2)).log())).sum())
    sizes = [math.ceil(round(step * n / steps, 9)) for step in range(steps + 1)]
    high = [float(without(order[:size])[j]) for size in sizes]
    low = [float(without(order[n - size :])[j]) for size in sizes]
    if name == "aopc":
        return sum(float(full[j]) - one for one in high) / (steps + 1)

    def area(line: list[float]) -> float:
        pieces = zip(sizes[:-1], sizes[1:], line[:-1], line[1:], strict=True)
        return sum((b - a) / n * (one + two) / 2 for a, b, one, two in pieces)

    return {"morf": area(high), "lerf": area(low), "area-between": area(low) - area(high)}[name]


def by_hand(network: small.Classifier, ids: Tensor, baseline: Tensor | None = None) -> Without:
    return lambda removed: small.probabilities(network, ids, removed, baseline)


@pytest.mark.parametrize("name", NAMES)
def test_each_metric_is_what_its_definition_gives(name: str) -> None:
    network, inputs, scores = small.model(), small.batch(), small.scores()
    wrapped = small.hooked(network)
    (found,) = judge(small.explanation(wrapped, inputs, scores), name, hooked=wrapped, batches=[inputs])
    for example, row in enumerate(scores):
        ids = inputs[0][example][: len(row)]
        order = sorted(range(1, len(row)), key=lambda position: -row[position])  # without [CLS]
        wanted = slow(name, by_hand(network, ids), order)
        assert found.values[example] == pytest.approx(wanted, abs=1e-5)
    assert found.undefined == 0
    assert len(set(found.values.tolist())) == len(scores)
    low, high = found.metric.range
    assert ((found.values >= low) & (found.values <= high)).all()


@pytest.mark.parametrize("name", ["comprehensiveness", "morf"])
def test_scores_below_zero_rank_last_or_by_their_absolute_value(name: str) -> None:
    network, inputs, scores = small.model(), small.batch(), small.scores()
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, scores)
    (found,) = judge(given, {"name": name, "absolute": True}, hooked=wrapped, batches=[inputs])
    for example, row in enumerate(scores):
        ids = inputs[0][example][: len(row)]
        order = sorted(range(1, len(row)), key=lambda position: -abs(row[position]))
        wanted = slow(name, by_hand(network, ids), order)
        assert found.values[example] == pytest.approx(wanted, abs=1e-5)


def test_the_bins_of_ten_positions_are_rounded_up() -> None:
    """1, 1, 1, 2 and 5 positions, as in ERASER's code; 30 positions at .1 are 3, whatever .1 * 30 is in floats."""
    network, inputs = small.model(), small.batch([31, 11])
    wrapped = small.hooked(network)
    calls: list[int] = []
    network.first.register_forward_hook(lambda *_: calls.append(1))
    given = small.explanation(wrapped, inputs, small.scores([31, 11]))
    (evidence,) = Evidence.of(given, hooked=wrapped, batches=[inputs])
    shares = curves(evidence, AOPC(steps=10)).shares
    assert (np.round(shares * [[30], [10]]) == [[3 * step for step in range(11)], list(range(11))]).all()
    calls.clear()
    judge(given, "comprehensiveness", hooked=wrapped, batches=[inputs])
    assert len(calls) <= 2 + 5  # a pass for each bin, of the whole batch


def test_a_pass_that_removes_nothing_more_is_saved() -> None:
    network, inputs = small.model(), small.batch([4, 3])
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, small.scores([4, 3]))
    calls: list[int] = []
    network.first.register_forward_hook(lambda *_: calls.append(1))
    judge(given, {"name": "morf", "steps": 100}, hooked=wrapped, batches=[inputs])
    assert len(calls) < 10


def test_the_model_comes_back_and_the_random_state_stays() -> None:
    network, inputs = small.model().train(), small.batch()
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, small.scores())
    before = fingerprint(network)
    judge(given, NAMES, hooked=wrapped, batches=[inputs])
    assert fingerprint(network) == before


# Operators


def test_the_operator_mask_puts_the_value_of_a_token() -> None:
    network, inputs, scores = small.model(), small.batch(), small.scores()
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, scores)
    metric = {"name": "comprehensiveness", "operator": "mask", "token": 2}
    (found,) = judge(given, metric, hooked=wrapped, batches=[inputs])
    assert found.metric.settings()["operator"] == "mask"
    assert "operator='mask'" in repr(found)
    for example, row in enumerate(scores):

        def with_mask(removed: Sequence[int], example: int = example, length: int = len(row)) -> Tensor:
            ids = inputs[0][example][:length].clone()
            ids[list(removed)] = 2
            return small.probabilities(network, ids, [])

        order = sorted(range(1, len(row)), key=lambda position: -row[position])
        assert found.values[example] == pytest.approx(slow("comprehensiveness", with_mask, order), abs=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "vector"])
def test_the_operator_baseline_puts_a_mean_or_a_vector(baseline: str) -> None:
    network, inputs, scores = small.model(), small.batch(), small.scores()
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, scores)
    vector = torch.arange(5.0)
    if baseline == "mean":
        vector = network.embedding.weight[inputs[0][inputs[1].bool()]].mean(0).detach()
    metric = {"name": "sufficiency", "baseline": "mean" if baseline == "mean" else Token(vector)}
    (found,) = judge(given, metric, hooked=wrapped, batches=[inputs])
    for example, row in enumerate(scores):
        ids = inputs[0][example][: len(row)]
        order = sorted(range(1, len(row)), key=lambda position: -row[position])
        wanted = slow("sufficiency", by_hand(network, ids, vector), order)
        assert found.values[example] == pytest.approx(wanted, abs=1e-5)


def test_a_hidden_state_is_judged_at_its_own_site() -> None:
    network, inputs, scores = small.model(), small.batch(), small.scores()
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, scores, site="first:output")
    (found,) = judge(given, "comprehensiveness", hooked=wrapped, batches=[inputs])
    assert found.site == "first:output"
    for example, row in enumerate(scores):
        ids = inputs[0][example][: len(row)]

        def without(removed: Sequence[int], ids: Tensor = ids) -> Tensor:
            hidden = network.first(network.embedding(ids).cumsum(0))
            hidden[list(removed)] = 0
            return network.last(torch.tanh(hidden).sum(0)).softmax(0).double()

        order = sorted(range(1, len(row)), key=lambda position: -row[position])
        with torch.no_grad():
            assert found.values[example] == pytest.approx(slow("comprehensiveness", without, order), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "erase"}, "operator must be one of 'baseline', 'mask', 'delete'"),
        ({"operator": "delete"}, "is not tagged as one"),
        ({"operator": "mask"}, "knows no mask token"),
        ({"operator": "mask", "token": 99}, "no token 99"),
        ({"token": 2}, "is for operator='mask'"),
        ({"bins": (0.5, 0.0)}, "bins must be"),
        ({"bins": ()}, "bins must be"),
        ({"baseline": "zer"}, "zero"),
    ],
)
def test_an_operator_that_does_not_fit(settings: dict[str, Any], message: str) -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(wrapped, inputs, small.scores())
    with pytest.raises(MaskhooksError, match=message):
        judge(given, {"name": "comprehensiveness", **settings}, hooked=wrapped, batches=[inputs])


def test_a_baseline_of_another_site() -> None:
    wrapped, inputs = small.hooked(), small.batch()
    baseline = Token(torch.zeros(5))
    for site in (small.SITE, "first:output"):
        given = small.explanation(wrapped, inputs, small.scores(), site=site)
        if site == small.SITE:
            assert judge(given, {"name": "morf", "baseline": baseline}, hooked=wrapped, batches=[inputs])
            continue
        with pytest.raises(SettingError, match=r"has shape \[5\], but the features of first:output have shape \[7\]"):
            judge(given, {"name": "morf", "baseline": baseline}, hooked=wrapped, batches=[inputs])


def test_the_operator_mask_needs_an_embedding() -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(wrapped, inputs, small.scores(), site="first:output")
    with pytest.raises(SettingError, match=r"needs the output of an nn.Embedding"):
        judge(given, {"name": "morf", "operator": "mask", "token": 2}, hooked=wrapped, batches=[inputs])


# Which positions, and in which order


def test_equal_scores_are_in_an_order_of_the_seed_that_no_batch_changes() -> None:
    lengths = (9, 6, 7, 8)
    wrapped, inputs = small.hooked(), small.batch(lengths)
    level = [np.zeros(length) for length in lengths]
    given = small.explanation(wrapped, inputs, level)

    def values(seed: int, batches: list[Any]) -> list[float]:
        metric = {"name": "comprehensiveness", "seed": seed}
        return judge(given, metric, hooked=wrapped, batches=batches)[0].values.tolist()

    parts = [(inputs[0][:3], inputs[1][:3]), (inputs[0][3:], inputs[1][3:])]
    assert values(0, [inputs]) == pytest.approx(values(0, parts), abs=1e-6)
    assert values(0, [inputs]) != pytest.approx(values(1, [inputs]), abs=1e-6)


def test_random_orders_of_equal_scores_favour_no_position() -> None:
    """Over many seeds the mean is that of all orders."""
    network, inputs = small.model(), small.batch([4])
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, [np.zeros(4)])
    metric = {"name": "comprehensiveness", "bins": (0.3,)}
    found = [
        judge(given, {**metric, "seed": seed}, hooked=wrapped, batches=[inputs])[0].values[0] for seed in range(300)
    ]
    full = small.probabilities(network, inputs[0][0], [])
    alone = [small.probabilities(network, inputs[0][0], [position]) for position in (1, 2, 3)]
    each = [float(full.max() - one[full.argmax()]) for one in alone]
    assert {round(value, 5) for value in found} == {round(value, 5) for value in each}
    assert np.mean(found) == pytest.approx(np.mean(each), abs=4 * np.std(each) / math.sqrt(300))


def test_special_tokens_are_removed_if_they_count() -> None:
    network, inputs, scores = small.model(), small.batch(), small.scores()
    wrapped = small.hooked(network)
    given = small.explanation(wrapped, inputs, scores)
    (found,) = judge(given, "sufficiency", hooked=wrapped, batches=[inputs], counts=lambda label: True)
    for example, row in enumerate(scores):
        ids = inputs[0][example][: len(row)]
        order = sorted(range(len(row)), key=lambda position: -row[position])
        wanted = slow("sufficiency", by_hand(network, ids), order)
        assert found.values[example] == pytest.approx(wanted, abs=1e-5)


def test_positions_gated_together_are_one() -> None:
    network, lengths = small.model(), (7, 5)
    inputs = small.batch(lengths)
    pairs = torch.arange(7).expand(2, -1).add(1).div(2, rounding_mode="floor")  # [CLS], then two by two
    wrapped = small.hooked(network, units=lambda batch: pairs)
    scores = [np.array([0, 3, 3, 1, 1, 2, 2.0]), np.array([0, 1, 1, 2, 2.0])]
    given = small.explanation(wrapped, inputs, scores)
    (found,) = judge(given, "comprehensiveness", hooked=wrapped, batches=[inputs])
    orders = [[(1, 2), (5, 6), (3, 4)], [(3, 4), (1, 2)]]
    for example, order in enumerate(orders):
        ids = inputs[0][example][: lengths[example]]
        full = small.probabilities(network, ids, [])
        j = int(full.argmax())
        total = 0.0
        for share in BINS:
            words = order[: math.ceil(share * len(order))]
            total += float(full[j] - small.probabilities(network, ids, [at for word in words for at in word])[j])
        assert found.values[example] == pytest.approx(total / 5, abs=1e-5)


def test_some_examples_of_the_batches() -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(wrapped, inputs, small.scores(), start_index=10)
    (all_,) = judge(given, "morf", hooked=wrapped, batches=[inputs], start_index=10)
    (some,) = judge(given.select(example=[11, 13]), "morf", hooked=wrapped, batches=[inputs], start_index=10)
    assert some.examples.tolist() == [11, 13]
    assert some.values.tolist() == pytest.approx(all_.values[[1, 3]].tolist())


# Rows of examples, as in graphs


class Edges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, graph: Tensor, count: int) -> Tensor:
        messages = torch.tanh(self.message(x))
        return self.head(torch.zeros(count, 4).index_add(0, graph, messages))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_belong_to_examples_by_an_index(name: str) -> None:
    network = Edges().eval()
    graph = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    x = torch.randn(7, 3)
    wrapped = maskhooks.wrap(
        network,
        sites={"message:output": "edge hidden -> edge"},
        output=lambda logits: Categorical(logits=logits),
        example_index=lambda batch: batch[1],
    )
    scores = torch.randn(7)
    (site,) = wrapped.find("message:output")
    batch = (x, graph, 2)
    rows = Scores(site, 0, scores, torch.ones(7, dtype=torch.bool), None, _index(graph))
    given = Explanation.build([rows], provenance={})
    (found,) = judge(given, name, hooked=wrapped, batches=[batch])
    for example in (0, 1):
        own = [edge for edge in range(7) if graph[edge] == example]

        def without(removed: Sequence[int], own: list[int] = own) -> Tensor:
            total = torch.zeros(4)
            for edge in own:
                value = network.message(x[edge])
                total = total + torch.tanh(value * 0 if edge in removed else value)
            return network.head(total).softmax(0).double()

        order = sorted(own, key=lambda edge: -float(scores[edge]))
        with torch.no_grad():
            assert found.values[example] == pytest.approx(slow(name, without, order), abs=1e-5)


def _index(graph: Tensor) -> Any:
    from maskhooks.sites.example_index import ExampleIndex

    return ExampleIndex(graph, 2)


# What does not fit


def test_an_explanation_of_another_model() -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(small.hooked(small.model(1)), inputs, small.scores())
    with pytest.raises(SettingError, match="of another model than this Classifier"):
        judge(given, "morf", hooked=wrapped, batches=[inputs])


@pytest.mark.parametrize("wrong", ["other texts", "too few", "another order"])
def test_other_batches(wrong: str) -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(wrapped, inputs, small.scores())
    order = [1, 0, 2, 3]
    batches = {
        "other texts": (small.batch(seed=5), "not those that were explained"),
        "too few": ((inputs[0][:3], inputs[1][:3]), "explanation has example 3"),
        "another order": ((inputs[0][order], inputs[1][order]), "not those that were explained"),
    }
    found, message = batches[wrong]
    with pytest.raises(SettingError, match=message):
        judge(given, "morf", hooked=wrapped, batches=[found])


def test_batches_that_only_their_predictions_tell_apart() -> None:
    """Such as images: positions have no labels of their own."""
    wrapped = maskhooks.wrap(
        nn.Sequential(nn.Linear(4, 3)).eval(),
        sites={"0:output": "batch hidden -> batch hidden"},
        output=lambda logits: Categorical(logits=logits),
    )
    batch = torch.randn(20, 4)
    given = maskhooks.Random(wrapped, "0:output").explain(batch)
    assert judge(given, "morf", hooked=wrapped, batches=[batch])
    with pytest.raises(SettingError, match=r"was predicted '.', and here it is"):
        judge(given, "morf", hooked=wrapped, batches=[batch.flip(0)])


def test_a_model_and_batches_are_needed() -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(wrapped, inputs, small.scores())
    for arguments in ({}, {"hooked": wrapped}, {"batches": [inputs]}):
        with pytest.raises(SettingError, match="'morf' needs the wrapped model and the batches"):
            judge(given, "morf", **arguments)


def test_the_curves_are_those_of_the_metrics() -> None:
    wrapped, inputs = small.hooked(), small.batch()
    given = small.explanation(wrapped, inputs, small.scores())
    (evidence,) = Evidence.of(given, hooked=wrapped, batches=[inputs])
    metric = registry.make(METRICS, "area-between", steps=7)
    assert isinstance(metric, CurveMetric)
    found = curves(evidence, metric)
    shares, high, low = found.shares, found.highest_first, found.lowest_first
    assert shares.shape == high.shape == low.shape == (4, 8)
    assert (shares[:, [0, -1]] == [0, 1]).all()
    assert high[:, [0, -1]] == pytest.approx(low[:, [0, -1]])
    area = [np.trapezoid(low[at] - high[at], shares[at]) for at in range(4)]
    assert metric(evidence) == pytest.approx(area)
