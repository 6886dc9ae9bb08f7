"""PyG's metrics of our explanations: as PyG gives them when it is called with the same masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.explain import Explainer, Explanation
from torch_geometric.explain.algorithm import DummyExplainer
from torch_geometric.explain.metric import characterization_score, fidelity, unfaithfulness
from torch_geometric.nn import GCNConv, SAGEConv, global_add_pool

import maskhooks
from maskhooks import Hooked
from maskhooks.errors import SettingError
from maskhooks.metrics.judgement import judge
from tests.adapters.geometric_models import EDGES, Nodes, Pooled, Typed, batch, graph, hetero, randn
from tests.metrics import small

NAMES = ["fidelity-plus", "fidelity-minus", "characterization", "unfaithfulness"]


def scaled(model: nn.Module) -> nn.Module:
    """The model with larger weights, so that predictions change."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model.eval()


def theirs(model: nn.Module, data: Data, level: str, returns: str = "raw", **masks: Tensor) -> dict[str, float]:
    """What PyG gives for one graph."""
    explainer = Explainer(
        model,
        algorithm=DummyExplainer(),
        explanation_type="model",
        model_config={"mode": "multiclass_classification", "task_level": level, "return_type": returns},
        **{f"{name}_type": "object" for name in masks},
    )
    explanation = Explanation(x=data.x, edge_index=data.edge_index, **masks)
    explanation._model_args = []
    explanation.prediction = explainer.get_prediction(data.x, data.edge_index)
    explanation.target = explainer.get_target(explanation.prediction)
    plus, minus = fidelity(explainer, explanation)
    both = characterization_score(torch.tensor(plus), torch.tensor(minus), 0.5, 0.5)
    return dict(zip(NAMES, [plus, minus, float(both), unfaithfulness(explainer, explanation)], strict=True))


def values(explanation: Any, hooked: Hooked, batches: list[Any], **settings: Any) -> dict[str, list[float]]:
    found = judge(explanation, [{"name": name, **settings} for name in NAMES], hooked=hooked, batches=batches)
    return {one.metric.name: one.values.tolist() for one in found}


def messages(hooked: Hooked, data: Any, site: str, seed: int = 0) -> tuple[Any, list[Tensor]]:
    """A random explanation of a layer's messages, and each graph's mask of edges that are kept."""
    explanation = maskhooks.Random(hooked, site, seed=seed).explain(data)
    masks = [torch.zeros(one.num_edges) for one in data.to_data_list()]
    for example, edge, kept in zip(*(explanation[name] for name in ("example", "edge", "kept")), strict=True):
        if edge >= 0:
            masks[example][edge] = max(float(masks[example][edge]), float(kept))
    return explanation, masks


@pytest.mark.parametrize("site", ["first.message:output", "second.message:output"])
@pytest.mark.parametrize("seed", range(4))
def test_edges_of_several_graphs(site: str, seed: int) -> None:
    model, data = scaled(Pooled()), batch()
    hooked = maskhooks.wrap(model)
    explanation, masks = messages(hooked, data, site, seed)
    found = values(explanation, hooked, [data])
    wanted = [theirs(model, one, "graph", edge_mask=mask) for one, mask in zip(data.to_data_list(), masks, strict=True)]
    for name in NAMES:
        assert found[name] == pytest.approx([one[name] for one in wanted], abs=1e-6)


def test_all_values_occur() -> None:
    """So that the comparison above is not one of zeros."""
    model, data = scaled(Pooled()), batch()
    hooked = maskhooks.wrap(model)
    seen: dict[str, set[float]] = {name: set() for name in NAMES}
    for seed in range(12):
        explanation, _ = messages(hooked, data, "first.message:output", seed)
        for name, row in values(explanation, hooked, [data]).items():
            seen[name] |= set(row)
    for name in NAMES[:3]:
        assert seen[name] == {0.0, 1.0}
    assert len(seen["unfaithfulness"]) > 10


def test_nodes_with_a_prediction_each() -> None:
    model, data = scaled(Nodes()), graph()
    hooked = maskhooks.wrap(model, sites={"first:input": "node feature -> node"}, level="node")
    explanation = maskhooks.Random(hooked, "first:input").explain(data)
    mask = torch.as_tensor(explanation["kept"]).float()[:, None]
    assert 0 < mask.sum() < 5
    found, wanted = values(explanation, hooked, [data]), theirs(model, data, "node", node_mask=mask)
    for name in NAMES:
        assert found[name] == pytest.approx([wanted[name]], abs=1e-6)
    hooked = maskhooks.wrap(model)
    edges, (kept,) = messages(hooked, Batch.from_data_list([data]), "first.message:output")
    wanted = theirs(model, data, "node", edge_mask=kept)
    for name, row in values(edges, hooked, [data]).items():
        assert row == pytest.approx([wanted[name]], abs=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_a_share_of_the_highest_scores(share: float) -> None:
    model, data = scaled(Pooled()), batch()
    hooked = maskhooks.wrap(model)
    explanation = maskhooks.Random(hooked, "first.message:output").explain(data)
    found = values(explanation, hooked, [data], share=share)
    for example, one in enumerate(data.to_data_list()):
        rows = (explanation["example"] == example) & (explanation["edge"] >= 0)
        best = np.full(one.num_edges, -np.inf)
        for edge, score in zip(explanation["edge"][rows], explanation["score"][rows], strict=True):
            best[edge] = max(best[edge], score)
        count = math.ceil(round(share * np.isfinite(best).sum(), 6))
        mask = torch.zeros(one.num_edges)
        mask[torch.as_tensor(np.argsort(-best)[:count].copy())] = 1
        wanted = theirs(model, one, "graph", edge_mask=mask)
        for name in NAMES:
            assert found[name][example] == pytest.approx(wanted[name], abs=1e-6)


def test_unfaithfulness_by_hand() -> None:
    """KL of what is left from the whole, not the other way round."""
    model, data = scaled(Pooled()), graph()
    hooked = maskhooks.wrap(model)
    explanation, (mask,) = messages(hooked, Batch.from_data_list([data]), "first.message:output", 1)
    (found,) = judge(explanation, "unfaithfulness", hooked=hooked, batches=[data])
    whole = model(data.x, data.edge_index).softmax(-1)[0].tolist()

    def scale(layer: nn.Module, given: Any) -> Any:
        rows = given[0]["x_j"]
        weights = torch.cat([mask[data.edge_index[0] != data.edge_index[1]], torch.ones(5)])
        return ({**given[0], "x_j": rows * weights.view(-1, *[1] * (rows.dim() - 1))},)

    handles = [layer.register_message_forward_pre_hook(scale) for layer in (model.first, model.second)]
    left = model(data.x, data.edge_index).softmax(-1)[0].tolist()
    for handle in handles:
        handle.remove()
    divergence = sum(q * math.log(q / p) for p, q in zip(whole, left, strict=True))
    assert found.values == pytest.approx([1 - math.exp(-divergence)], abs=1e-5)


class One(nn.Module):
    """One logit for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = GCNConv(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        found: Tensor = self.last(global_add_pool(self.conv(x, edge_index).relu(), batch))
        return found


def test_one_logit_is_two_classes() -> None:
    model = scaled(One())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = model

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            logit = self.one(x, edge_index)
            return torch.cat([torch.zeros_like(logit), logit], 1)

    data = batch()
    hooked = maskhooks.wrap(model)
    for seed in range(3):
        explanation, masks = messages(hooked, data, "conv.message:output", seed)
        found = values(explanation, hooked, [data])
        for example, (one, mask) in enumerate(zip(data.to_data_list(), masks, strict=True)):
            wanted = theirs(Two().eval(), one, "graph", edge_mask=mask)
            for name in NAMES:
                assert found[name][example] == pytest.approx(wanted[name], abs=1e-6)
    assert max(found["unfaithfulness"]) > 1e-5  # PyG gives 0 for the softmax of one logit


def test_the_model_is_as_it_was() -> None:
    model, data = scaled(Pooled()), batch()
    model.train()
    model.second.eval()
    hooked = maskhooks.wrap(model)
    explanation, _ = messages(hooked, data, "first.message:output")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    values(explanation, hooked, [data])
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    for name, own in before.items():
        assert own.keys() == after[name].keys()
        assert own["training"] == after[name]["training"]
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert np.array_equal(messages(hooked, data, "first.message:output")[0]["score"], explanation["score"])


def test_other_indices_and_some_examples() -> None:
    model, data = scaled(Pooled()), batch()
    hooked = maskhooks.wrap(model)
    explainer = maskhooks.Random(hooked, "first.message:output")
    found = values(explainer.explain(data), hooked, [data])
    shifted = explainer.explain(data, start_index=5).select(example=[6, 7])
    some = judge(shifted, NAMES, hooked=hooked, batches=[data], start_index=5)
    for one in some:
        assert one.values.tolist() == pytest.approx(found[one.metric.name][1:])


class TestWhatDoesNotFit:
    def test_other_models(self) -> None:
        hooked, inputs = small.hooked(), small.batch()
        explanation = small.explanation(hooked, inputs, small.scores())
        with pytest.raises(SettingError, match="'fidelity-plus' is for graph networks of PyTorch Geometric"):
            judge(explanation, "fidelity-plus", hooked=hooked, batches=[inputs])

    def test_types_of_edges(self) -> None:
        hooked, data = maskhooks.wrap(scaled(Typed())), hetero()
        explanation = maskhooks.Random(hooked, "message").explain(data)
        with pytest.raises(SettingError, match="one type of nodes and edges"):
            judge(explanation, "unfaithfulness", hooked=hooked, batches=[data])

    def test_numbers(self) -> None:
        hooked = maskhooks.wrap(scaled(One()), output=lambda outputs: Normal(outputs[:, 0], 1.0))
        data = batch()
        explanation = maskhooks.Random(hooked, "conv.message:output").explain(data)
        with pytest.raises(SettingError, match="for classes, and the outputs are Normal"):
            judge(explanation, "fidelity-minus", hooked=hooked, batches=[data])

    def test_other_batches(self) -> None:
        hooked, data = maskhooks.wrap(scaled(Pooled())), batch()
        explanation = maskhooks.Random(hooked, "first.message:output").explain(data)
        parts = data.to_data_list()
        with pytest.raises(SettingError, match="example 0 has other edges or nodes"):
            judge(explanation, "fidelity-plus", hooked=hooked, batches=[Batch.from_data_list(parts[::-1])])
        with pytest.raises(SettingError, match="the explanation has example 2"):
            judge(explanation, "fidelity-plus", hooked=hooked, batches=[Batch.from_data_list(parts[:2])])

    def test_nan_and_another_model(self) -> None:
        model, data = scaled(Pooled()), graph()
        hooked = maskhooks.wrap(model)
        explanation = maskhooks.Random(hooked, "first.message:output").explain(data)
        with torch.no_grad():
            model.last.weight.mul_(2)
        with pytest.raises(SettingError, match="of another model"):
            judge(explanation, "fidelity-plus", hooked=hooked, batches=[data])
        explanation["score"][0] = math.nan
        with pytest.raises(SettingError, match="NaN"):
            judge(explanation, "fidelity-plus", batches=[data], hooked=scaled_back(model, hooked))

    def test_a_site_without_edges_or_nodes(self) -> None:
        hooked = maskhooks.wrap(scaled(Pooled()), sites={"last:input": "graph hidden -> graph hidden"})
        data = batch()
        explanation = maskhooks.Random(hooked, "last:input").explain(data)
        with pytest.raises(SettingError, match="has neither"):
            judge(explanation, "unfaithfulness", hooked=hooked, batches=[data])

    def test_settings(self) -> None:
        hooked, data = maskhooks.wrap(scaled(Pooled())), graph()
        explanation = maskhooks.Random(hooked, "first.message:output").explain(data)
        for settings, words in (({"share": 0.0}, "share must be"), ({"weight": 1.0}, "weight must be")):
            with pytest.raises(SettingError, match=words):
                judge(explanation, {"name": "characterization", **settings}, hooked=hooked, batches=[data])


def scaled_back(model: nn.Module, hooked: Hooked) -> Hooked:
    with torch.no_grad():
        model.last.weight.div_(2)
    return hooked


def test_graphs_as_mappings_and_by_a_function() -> None:
    class Own(nn.Module):
        """Arguments of other names and in another order."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = SAGEConv(3, 6), nn.Linear(6, 3)

        def forward(self, links: Tensor, states: Tensor) -> Tensor:
            found: Tensor = self.last(self.conv(states, links).tanh())
            return found

    class Turned(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            found: Tensor = self.model(edge_index, x)
            return found

    model = scaled(Own())
    data = {"x": randn(5, 3), "edge_index": EDGES}
    hooked = maskhooks.wrap(model, call=lambda model, data: model(data["edge_index"], data["x"]), level="node")
    explanation = maskhooks.Random(hooked, "conv.message:output").explain(data)
    found = values(explanation, hooked, [data])
    mask = torch.zeros(7)
    for edge, kept in zip(explanation["edge"], explanation["kept"], strict=True):
        mask[edge] = float(kept)
    wanted = theirs(Turned(model).eval(), Data(**data), "node", edge_mask=mask)
    for name in NAMES:
        assert found[name] == pytest.approx([wanted[name]], abs=1e-6)
