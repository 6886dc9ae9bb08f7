"""PyTorch Geometric's metrics of our explanations: as it computes them itself, and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maskhooks
from maskhooks import Explanation, Hooked, LeaveOneOut, Random
from maskhooks.errors import SettingError
from maskhooks.metrics.judgement import judge
from maskhooks.model.fingerprint import fingerprint
from tests.metrics import small

pytest.importorskip("torch_geometric")
from maskhooks_geometric.given import Given
from torch_geometric.explain import Explainer
from torch_geometric.explain.metric import fidelity, unfaithfulness
from torch_geometric.nn import GCNConv, global_add_pool

from tests.adapters.geometric_models import Nodes, Pooled, batch, graph, hetero

NAMES = ["fidelity-plus", "fidelity-minus", "characterization", "unfaithfulness"]


def wrapped(model: nn.Module | None = None, seed: int = 0) -> Hooked:
    torch.manual_seed(seed)
    return maskhooks.wrap(model or Pooled())


def explained(hooked: Hooked) -> Explanation:
    (site,) = hooked.sites.tagged("edge")
    return LeaveOneOut(hooked, str(site)).explain(batch())


def values(hooked: Hooked, explanation: Explanation, metric: Any, data: Any = None) -> Any:
    (found,) = judge(explanation, metric, hooked=hooked, batches=[batch() if data is None else data])
    return found.values


def masks(explanation: Explanation, share: float) -> list[Tensor]:
    """The highest scores of each graph, by hand."""
    found = []
    for number, one in enumerate(batch().to_data_list()):
        here = explanation.select(example=number)
        mask = torch.zeros(one.edge_index.shape[1])
        order = np.argsort(-here["score"], kind="stable")[: math.ceil(share * len(mask))]
        mask[torch.from_numpy(here["edge"][order].astype(np.int64))] = 1
        found.append(mask)
    return found


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_pytorch_geometric_computes_them(share: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = Pooled()
    hooked = wrapped(model)
    before = fingerprint(model)
    explanation = explained(hooked)
    wanted: dict[str, list[float]] = {name: [] for name in NAMES}
    for one, mask in zip(batch().to_data_list(), masks(explanation, share), strict=True):
        explainer = Explainer(
            model.eval(),
            Given(mask),
            explanation_type="model",
            edge_mask_type="object",
            model_config={"mode": "multiclass_classification", "task_level": "graph", "return_type": "raw"},
        )
        theirs = explainer(one.x, one.edge_index)
        plus, minus = fidelity(explainer, theirs)
        wanted["fidelity-plus"].append(plus)
        wanted["fidelity-minus"].append(minus)
        wanted["characterization"].append(0.0 if plus == 0 or minus == 1 else 2 / (1 / plus + 1 / (1 - minus)))
        wanted["unfaithfulness"].append(float(unfaithfulness(explainer, theirs)))
    for name in NAMES:
        found = values(hooked, explanation, {"name": name, "share": share})
        assert found == pytest.approx(wanted[name], abs=1e-5), name
    assert fingerprint(model) == before
    assert not any(getattr(module, "_edge_mask", None) is not None for module in model.modules())


class Sums(nn.Module):
    """The class is that of the sign of what node 0 gets by its edges, so that one edge decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = GCNConv(3, 2, normalize=False, add_self_loops=False, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        result: Tensor = global_add_pool(self.conv(x, edge_index), batch)
        return result


def test_by_hand_where_one_edge_decides() -> None:
    model = Sums()
    with torch.no_grad():
        model.conv.lin.weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]))
    data = graph(3, torch.tensor([[0, 1, 2], [1, 2, 0]]))
    data.x = torch.tensor([[5.0, 0, 0], [-1.0, 0, 0], [-1.0, 0, 0]])  # edge 0 carries 5, the others -1
    hooked = wrapped(model)
    (site,) = hooked.sites.tagged("edge")
    explanation = LeaveOneOut(hooked, str(site)).explain(data)
    assert int(explanation["edge"][np.argmax(explanation["score"])]) == 0
    found = {name: values(hooked, explanation, {"name": name, "share": 0.3}, data).tolist() for name in NAMES}
    assert found["fidelity-plus"] == [1.0]
    assert found["fidelity-minus"] == [0.0]
    assert found["characterization"] == [1.0]
    before, after = (torch.tensor([one, -one]).softmax(0) for one in (3.0, 5.0))
    nats = float((after * (after / before).log()).sum())  # of the masked prediction from the whole one
    assert found["unfaithfulness"] == pytest.approx([1 - math.exp(-nats)], abs=1e-5)


def test_the_edges_that_an_explanation_keeps() -> None:
    hooked = wrapped()
    explanation = explained(hooked)
    everything = explanation.select()
    everything.columns["kept"] = np.ones(len(explanation["kept"]), bool)
    assert values(hooked, everything, "fidelity-minus").tolist() == [0.0] * 3
    assert values(hooked, everything, "unfaithfulness") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_do_not_fit(name: str) -> None:
    text = small.hooked()
    scores = Random(text, small.SITE).explain(small.batch())
    with pytest.raises(SettingError, match="needs scores of the edges"):
        judge(scores, name, hooked=text, batches=[small.batch()])
    hooked = wrapped()
    with pytest.raises(SettingError, match="needs the wrapped model"):
        judge(explained(hooked), name)
    nodes = wrapped(Nodes())
    sites = [str(site) for site in nodes.sites.tagged("message")]
    with pytest.raises(SettingError, match="needs scores of the edges"):
        judge(Random(nodes, sites[0]).explain(graph()), name, hooked=nodes, batches=[graph()])


def test_several_types_of_edges_are_refused() -> None:
    from tests.adapters.test_geometric_explain import Typed

    hooked = wrapped(Typed())
    (site,) = hooked.sites.tagged("edge")
    explanation = Random(hooked, str(site)).explain(hetero())
    with pytest.raises(SettingError, match="with one type of edge"):
        judge(explanation, "fidelity-plus", hooked=hooked, batches=[hetero()])


def test_a_single_logit_has_no_unfaithfulness() -> None:
    model = Pooled()
    model.last = nn.Linear(8, 1)
    hooked = wrapped(model)
    explanation = explained(hooked)
    with pytest.raises(SettingError, match="always 0 for a model with a single logit"):
        values(hooked, explanation, "unfaithfulness")
    assert set(values(hooked, explanation, {"name": "fidelity-plus", "share": 0.5})) <= {0.0, 1.0}
