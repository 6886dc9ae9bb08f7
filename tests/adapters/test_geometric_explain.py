"""PyTorch Geometric's Explainer and ours, both ways round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from maskhooks_geometric.algorithm import MaskAlgorithm
from maskhooks_geometric.peer import Peer
from maskhooks_geometric.restored import restored
from torch_geometric.explain import Explainer, GNNExplainer, PGExplainer
from torch_geometric.explain.algorithm import DummyExplainer, GraphMaskExplainer
from torch_geometric.explain.metric import fidelity, unfaithfulness

import maskhooks
from maskhooks.errors import ModelError, SettingError
from maskhooks.model.hooked import Hooked
from tests.adapters.geometric_models import RELATIONS, Nodes, Pooled, Typed, batch, graph, hetero, randn

Unchanged = Callable[[nn.Module], nn.Module]
CONFIG = {"mode": "multiclass_classification", "return_type": "raw"}


def masks(hooked: Hooked) -> maskhooks.DiffMask:
    return maskhooks.DiffMask(hooked, "message", amortized=False, recipe=maskhooks.Recipe(steps=3))


def random(hooked: Hooked) -> maskhooks.Random:
    return maskhooks.Random(hooked, "message")


def explained(model: nn.Module, algorithm: Any, level: str, **settings: Any) -> Explainer:
    config = {**CONFIG, "task_level": level, **settings}
    return Explainer(model, algorithm=algorithm, explanation_type="model", edge_mask_type="object", model_config=config)


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_masks_within_pyg(unchanged: Unchanged) -> None:
    """1-D edge_mask for PyG's own metrics, and the layers' beside it."""
    model, data = Pooled().eval(), batch()
    unchanged(model)
    explainer = explained(model, MaskAlgorithm(masks), "graph")
    found = explainer(data.x, data.edge_index, batch=data.batch)
    assert found.edge_mask.shape == (data.num_edges,)
    assert found.edge_mask_by_layer.shape == (data.num_edges, 2)
    assert torch.equal(found.edge_mask, found.edge_mask_by_layer.amax(1))
    assert found.layers == ["first.message:output", "second.message:output"]
    assert found.validate_masks()
    assert 0 < found.edge_mask.min() <= found.edge_mask.max() < 1
    with restored(model):  # as these leave it changed
        assert 0 <= unfaithfulness(explainer, found) <= 1
        assert len(fidelity(explainer, found)) == 2


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_arguments_of_other_names(unchanged: Unchanged) -> None:
    class Own(Nodes):
        def forward(self, states: Any, links: Any, scale: float = 1.0, **more: Any) -> Any:  # type: ignore[override]
            return super().forward(states, links) * scale + (0.0 if more.get("shift") is None else more["shift"])

    model, data = Own().eval(), graph()
    unchanged(model)
    found = explained(model, MaskAlgorithm(masks), "node")(data.x, data.edge_index, index=2, scale=2.0, shift=0.5)
    assert bool((found.edge_mask > 0).all())
    hooked = maskhooks.wrap(model, call=lambda model, data: model(data.states, data.edge_index))
    again = explained(model, MaskAlgorithm(masks(hooked)), "node")(data.x, data.edge_index, index=2)
    assert bool((again.edge_mask > 0).all())


def test_masks_are_those_of_the_rows() -> None:
    model, data = Pooled().eval(), batch()
    rows = random(maskhooks.wrap(model)).explain(data).select(site="second.message:output")
    found = explained(model, MaskAlgorithm(random, reduce="mean"), "graph")(data.x, data.edge_index, batch=data.batch)
    assert torch.allclose(found.edge_mask, found.edge_mask_by_layer.mean(1))
    first = [0, 7, 10]  # where the edges of each graph begin
    for example, edge, score in zip(rows["example"], rows["edge"], rows["score"], strict=True):
        if edge >= 0:
            assert found.edge_mask_by_layer[first[example] + edge, 1] == score


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_one_node_is_explained(unchanged: Unchanged) -> None:
    model, data = Nodes().eval(), graph()
    unchanged(model)
    seen: list[Any] = []

    def make(hooked: Hooked) -> maskhooks.DiffMask:
        seen.append(hooked)
        return maskhooks.DiffMask(hooked, "edge", amortized=False, recipe=maskhooks.Recipe(steps=3))

    found = explained(model, MaskAlgorithm(make), "node")(data.x, data.edge_index, index=2)
    assert found.edge_mask.shape == (7,)
    (hooked,) = seen
    with torch.no_grad():
        outputs = hooked.distribution(
            model(data.x, data.edge_index), {**data.to_dict(), "node_index": torch.tensor([2])}
        )
    assert outputs.logits.shape == (1, 3)


def test_types_of_edges(unchanged: Unchanged) -> None:
    model, data = Typed().eval(), hetero()
    unchanged(model)
    found = explained(model, MaskAlgorithm(random), "node")(data.x_dict, data.edge_index_dict)
    for relation in RELATIONS:
        assert found[relation].edge_mask.shape == (data[relation].num_edges,)
        assert len(found[relation].layers) == 1
    assert found.validate_masks()


@pytest.mark.parametrize(
    ("mode", "returns", "last"),
    [
        ("binary_classification", "raw", 1),
        ("binary_classification", "probs", 1),
        ("multiclass_classification", "probs", 2),
        ("multiclass_classification", "log_probs", 2),
    ],
)
@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
def test_what_outputs_are(mode: str, returns: str, last: int) -> None:
    class Returning(Pooled):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raw = super().forward(*args, **kwargs)[:, :last]
            ends = {"probs": torch.sigmoid if last == 1 else nn.Softmax(-1), "log_probs": nn.LogSoftmax(-1)}
            return ends.get(returns, lambda out: out)(raw)

        forward.__signature__ = __import__("inspect").signature(Pooled.forward)  # type: ignore[attr-defined]

    data = batch()
    found = explained(Returning().eval(), MaskAlgorithm(masks), "graph", mode=mode, return_type=returns)(
        data.x, data.edge_index, batch=data.batch
    )
    assert found.edge_mask.shape == (data.num_edges,)


def test_what_is_not_supported() -> None:
    with pytest.raises(ValueError, match="does not support"):
        explained(Pooled(), MaskAlgorithm(random), "graph", mode="regression")
    with pytest.raises(SettingError, match="'max' or 'mean'"):
        MaskAlgorithm(random, reduce="min")
    other = MaskAlgorithm(random(maskhooks.wrap(Pooled())))
    with pytest.raises(ModelError, match="made for another model"):
        explained(Pooled(), other, "graph")(graph().x, graph().edge_index)


@pytest.mark.parametrize(
    "make", [DummyExplainer, lambda: GNNExplainer(epochs=2), lambda: GraphMaskExplainer(2, epochs=1, log=False)]
)
def test_pyg_explains_through_us(make: Callable[[], Any], unchanged: Unchanged) -> None:
    class Layers(Pooled):
        """Two plain layers, as one of PyG's explainers takes no others."""

        def __init__(self) -> None:
            super().__init__()
            self.second = type(self.first)(8, 8)

    model, data = unchanged(Layers()), batch()
    needs = {"node_mask_type": "attributes"} if make is not DummyExplainer else {}
    peer = Peer(maskhooks.wrap(model), make(), **needs)
    rows = peer.explain(data)
    assert len(rows) == data.num_edges
    assert len(rows.metadata) == 3
    assert ((rows["score"] >= 0) & (rows["score"] <= 1)).all()
    again = Peer(maskhooks.wrap(model), make(), **needs).explain(data)
    assert (again["score"] == rows["score"]).all()
    assert bool(peer.changed) == (make is not DummyExplainer)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # within PGExplainer
def test_an_explainer_that_is_trained(unchanged: Unchanged) -> None:
    model, data, algorithm = Pooled(), batch(), PGExplainer(epochs=2, lr=0.003)
    with torch.no_grad():
        peer = Peer(maskhooks.wrap(unchanged(model)), algorithm).fit([data])
    assert len(peer.explain(data)) == data.num_edges


def test_types_of_edges_through_us(unchanged: Unchanged) -> None:
    data = hetero()
    rows = Peer(maskhooks.wrap(unchanged(Typed())), DummyExplainer()).explain(data)
    assert len(rows) == sum(data[relation].num_edges for relation in RELATIONS)


def test_a_model_is_put_back(unchanged: Unchanged) -> None:
    model = Pooled()
    model.first.weights_seen = [1, 2]
    unchanged(model)
    with restored(model) as changed:
        spoil(model)
    wanted = {
        "last.bias",
        "first._explain",
        "first.lin.weight",
        "first.weights_seen",
        "training",
        "last._forward_hooks",
    }
    assert wanted <= set(changed)
    with pytest.raises(RuntimeError, match="theirs"), restored(model):
        raise spoil(model)
    with restored(model) as changed:
        pass
    assert not changed


def spoil(model: Any) -> Exception:
    """All that an explainer might do to a model."""
    model.eval()
    model.first.lin.weight.requires_grad_(False)
    with torch.no_grad():
        model.last.bias.add_(1)
    model.first.explain = True
    model.first.weights_seen.append(3)
    model.second.new = 1
    model.last.register_forward_hook(lambda *_: None)
    model.last(randn(2, 8)).sum().backward()
    torch.rand(3)
    return RuntimeError("theirs")
