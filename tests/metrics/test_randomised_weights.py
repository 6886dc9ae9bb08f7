"""Explanations of a model with random weights, and the model that comes back."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Explanation, Hooked
from maskhooks.errors import ModelError, SettingError
from maskhooks.metrics.judgement import judge
from maskhooks.metrics.random_weights import RandomWeights
from maskhooks.seeds import generator
from tests.metrics import small

BATCHES = [small.batch(seed=1), small.batch((5, 4), seed=2)]


def explained(hooked: Hooked, site: str = small.SITE, **settings: Any) -> tuple[maskhooks.LeaveOneOut, Explanation]:
    explainer = maskhooks.LeaveOneOut(hooked, site, **settings)
    return explainer, explainer.explain_all(BATCHES)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: (id(tensor), tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        one[0] == two[0] and torch.equal(one[1], two[1]) and one[2] == two[2]
        for one, two in zip(before.values(), after.values(), strict=True)
    )


def by_hand(network: small.Classifier, seed: int, layers: int, draw: int = 0) -> Hooked:
    """The same classifier with the weights of its last layers random."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for number, layer in enumerate([other.last, other.first, other.embedding][:layers]):
            numbers = generator(seed, 430, draw, number)
            for weight in layer.parameters():
                noise = torch.randn(weight.shape, generator=numbers, dtype=torch.float64)
                weight.copy_(noise * math.sqrt(sum(float(one) ** 2 for one in weight.flatten()) / weight.numel()))
    return small.hooked(other)


def correlations(first: Explanation, other: Explanation, absolute: bool) -> list[float]:
    found = []
    for example in np.unique(first["example"]):
        rows = first["valid"] & (first["example"] == example) & (first["position"] > 0)  # [CLS] does not count
        pair = [np.abs(one["score"][rows]) if absolute else one["score"][rows] for one in (first, other)]
        found.append(float(spearmanr(*pair).statistic))
    return found


@pytest.mark.parametrize("absolute", [False, True])
def test_the_correlation_with_random_weights(absolute: bool) -> None:
    network = small.model()
    hooked = small.hooked(network)
    explainer, explanation = explained(hooked)
    settings = {"name": "randomised-weights", "absolute": absolute, "seed": 3}
    (found,) = judge(explanation, settings, hooked=hooked, batches=BATCHES, explainer=explainer)
    _, other = explained(by_hand(network, 3, 3))
    assert found.values == pytest.approx(correlations(explanation, other, absolute))
    (again,) = judge(explanation, settings, hooked=hooked, batches=BATCHES, explainer=explainer)
    assert again.values.tolist() == found.values.tolist()
    (otherwise,) = judge(explanation, {**settings, "seed": 4}, hooked=hooked, batches=BATCHES, explainer=explainer)
    assert otherwise.values.tolist() != found.values.tolist()


def test_top_down_is_the_mean_over_steps() -> None:
    network = small.model()
    hooked = small.hooked(network)
    explainer, explanation = explained(hooked)
    settings = {"name": "randomised-weights", "layers": "top-down", "steps": 2}
    (found,) = judge(explanation, settings, hooked=hooked, batches=BATCHES, explainer=explainer)
    steps = [correlations(explanation, explained(by_hand(network, 0, layers))[1], False) for layers in (2, 3)]
    assert found.values == pytest.approx(np.mean(steps, 0))


def test_several_random_models() -> None:
    network = small.model()
    hooked = small.hooked(network)
    explainer, explanation = explained(hooked)
    settings = {"name": "randomised-weights", "draws": 3}
    (found,) = judge(explanation, settings, hooked=hooked, batches=BATCHES, explainer=explainer)
    draws = [correlations(explanation, explained(by_hand(network, 0, 3, draw))[1], False) for draw in range(3)]
    assert found.values == pytest.approx(np.mean(draws, 0))


def test_the_indices_of_examples_need_not_start_at_0() -> None:
    hooked = small.hooked()
    explainer = maskhooks.LeaveOneOut(hooked, small.SITE)
    shifted = explainer.explain_all(BATCHES, start_index=10)
    arguments: dict[str, Any] = {"hooked": hooked, "batches": BATCHES, "explainer": explainer}
    (found,) = judge(shifted, "randomised-weights", start_index=10, **arguments)
    (wanted,) = judge(explained(hooked)[1], "randomised-weights", **arguments)
    assert found.examples.tolist() == list(range(10, 16))
    assert found.values.tolist() == wanted.values.tolist()
    part = shifted.select(example=[11, 14])
    (some,) = judge(part, "randomised-weights", start_index=10, **arguments)
    assert some.values.tolist() == wanted.values[[1, 4]].tolist()


def test_scores_that_do_not_look_at_the_model_have_one() -> None:
    hooked = small.hooked()
    explainer = maskhooks.Random(hooked, small.SITE)
    explanation = explainer.explain_all(BATCHES)
    (found,) = judge(explanation, "randomised-weights", hooked=hooked, batches=BATCHES, explainer=explainer)
    assert found.values == pytest.approx(1)
    assert found.metric.better == "lower"


def test_several_sites_are_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = small.hooked()
    explainer = maskhooks.LeaveOneOut(hooked, [small.SITE, "first:output"])
    explanation, calls = explainer.explain_all(BATCHES), []
    explain_all = maskhooks.LeaveOneOut.explain_all
    monkeypatch.setattr(
        maskhooks.LeaveOneOut, "explain_all", lambda *given, **more: calls.append(1) or explain_all(*given, **more)
    )
    found = judge(explanation, "randomised-weights", hooked=hooked, batches=BATCHES, explainer=explainer)
    assert len(found) == 2
    assert calls == [1]
    assert found[0].values.tolist() != found[1].values.tolist()


class Odd(nn.Module):
    """Tied weights, a batch normalisation, whole numbers, a weight of its own and a layer that does not run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.scale = nn.BatchNorm1d(8), nn.Parameter(torch.ones(1))
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)
        self.embedding.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0].sum(1)
        return self.head(self.norm(hidden) * self.scale)


def odd() -> tuple[Hooked, list[torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, batches = Odd(), [torch.randint(9, (3, 5)) for _ in range(2)]
        network(batches[0])  # statistics of the normalisation
    sites = {"embedding:output": "batch token hidden -> batch token"}
    return maskhooks.wrap(network, sites=sites, output=lambda logits: Categorical(logits=logits)), batches


def test_the_model_comes_back_bit_for_bit() -> None:
    hooked, batches = odd()
    explainer = maskhooks.LeaveOneOut(hooked, "embedding:output")
    explanation = explainer.explain_all(batches)
    before, random, training = state(hooked.model), torch.get_rng_state(), hooked.model.training
    for settings in ({}, {"layers": "top-down"}):
        given = {"name": "randomised-weights", **settings}
        (found,) = judge(explanation, given, hooked=hooked, batches=batches, explainer=explainer)
        assert found.mean < 0.9
    assert same(before, state(hooked.model))
    assert hooked.model.head.weight is hooked.model.embedding.weight
    assert torch.equal(random, torch.get_rng_state())
    assert hooked.model.training == training
    assert np.array_equal(explainer.explain_all(batches)["score"], explanation["score"])


class Broken(maskhooks.LeaveOneOut):
    """Fails after the model has become random, and leaves it with another buffer."""

    broken = False

    def scores(self, clean: Any) -> Any:
        if self.broken:
            torch.rand(1)
            clean.hooked.model.norm.running_mean = torch.zeros(8)
            raise RuntimeError("no scores")
        return super().scores(clean)


def test_the_model_comes_back_after_an_error() -> None:
    hooked, batches = odd()
    explainer = Broken(hooked, "embedding:output")
    explanation = explainer.explain_all(batches)
    before, random = state(hooked.model), torch.get_rng_state()
    explainer.broken = True
    with pytest.raises(RuntimeError, match="no scores"):
        judge(explanation, "randomised-weights", hooked=hooked, batches=batches, explainer=explainer)
    assert same(before, state(hooked.model))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in hooked.model.modules())


def test_layers_from_the_output() -> None:
    hooked, batches = odd()
    model = hooked.model
    weights = RandomWeights(hooked, batches[0])
    expected = [[model.scale], [model.head.weight], [*model.norm.parameters()]]
    assert [list(map(id, layer)) for layer in weights.layers[:3]] == [list(map(id, layer)) for layer in expected]
    rest = {id(weight) for layer in weights.layers[3:] for weight in layer}
    assert rest == {id(weight) for weight in model.attention.parameters()}
    before = state(model)
    with weights.kept():
        for number in range(len(weights.layers)):
            weights.randomise(number)
        changed = state(model)
        assert not torch.equal(changed["scale"][1], before["scale"][1])
        assert torch.equal(changed["whole"][1], before["whole"][1])
        assert torch.equal(changed["norm.running_mean"][1], before["norm.running_mean"][1])
        assert changed["head.weight"][1].square().mean().item() == pytest.approx(
            before["head.weight"][1].square().mean().item(), rel=0.5
        )


def test_a_fitted_explainer_is_fitted_again_or_refused() -> None:
    network = small.model()
    hooked = small.hooked(network)

    def fitted(wrapped: Hooked) -> maskhooks.DiffMask:
        return maskhooks.DiffMask(wrapped, small.SITE, margin=0.3).fit(BATCHES, steps=2)

    explainer = fitted(hooked)
    explanation = explainer.explain_all(BATCHES)
    arguments: dict[str, Any] = {"hooked": hooked, "batches": BATCHES}
    with pytest.raises(SettingError, match=r"'diffmask' was fitted to the trained model.*Give a function"):
        judge(explanation, "randomised-weights", explainer=explainer, **arguments)
    before = state(network)
    (found,) = judge(explanation, "randomised-weights", explainer=fitted, **arguments)
    assert same(before, state(network))
    other = fitted(by_hand(network, 0, 3)).explain_all(BATCHES)
    assert found.values == pytest.approx(correlations(explanation, other, False), nan_ok=True)


def test_what_does_not_fit() -> None:
    hooked = small.hooked()
    explainer, explanation = explained(hooked)
    arguments: dict[str, Any] = {"hooked": hooked, "batches": BATCHES}
    with pytest.raises(SettingError, match="'randomised-weights' needs the explainer that made the explanation"):
        judge(explanation, "randomised-weights", **arguments)
    with pytest.raises(SettingError, match="'randomised-weights' needs the wrapped model and the batches"):
        judge(explanation, "randomised-weights", explainer=explainer)
    other = maskhooks.LeaveOneOut(small.hooked(small.model(0)), small.SITE)
    with pytest.raises(SettingError, match="was made for another model than hooked="):
        judge(explanation, "randomised-weights", explainer=other, **arguments)
    with pytest.raises(SettingError, match="made by leave-one-out, and not by the explainer 'random'"):
        judge(explanation, "randomised-weights", explainer=maskhooks.Random(hooked, small.SITE), **arguments)
    elsewhere = maskhooks.LeaveOneOut(hooked, "first:output")
    with pytest.raises(SettingError, match=r"has no scores of embedding:output.*first:output"):
        judge(explanation, "randomised-weights", explainer=elsewhere, **arguments)


class Fixed(nn.Module):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given.sum(1)


def test_a_model_without_weights() -> None:
    hooked = maskhooks.wrap(Fixed(), output=lambda logits: Categorical(logits=logits))
    with pytest.raises(ModelError, match="Fixed has no floating-point weight"):
        RandomWeights(hooked, torch.randn(2, 3, 4))
