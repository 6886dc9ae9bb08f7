"""GraphMask on a graph network of two layers in plain torch: what gates read, tied gates, graphs by themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import GraphMask, Recipe
from maskhooks.errors import UnknownSiteError
from maskhooks.masks.probes import MLP, Picked, Probe, SummedMLP
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import prediction_loss
from maskhooks.model.wrapping import wrap
from maskhooks.seeds import generator
from maskhooks.sites.site import Site

pytestmark = pytest.mark.usefixtures("unchecked")

QUICK = dataclasses.replace(Recipe.named("graph"), steps=6, warmup_steps=2, validations=2)
EDGE = "edge feature -> edge"
Graphs = tuple[Tensor, Tensor, Tensor]  # states, edges, the graph of each node


class Message(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 6)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.linear(source)


class Layer(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.message = Message(features)

    def forward(self, states: Tensor, edges: Tensor) -> Tensor:
        sent = self.message(states[edges[0]], states[edges[1]])
        return torch.tanh(torch.zeros(len(states), 6).index_add(0, edges[1], sent))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(4), Layer(6)])
        self.head = nn.Linear(6, 3)

    def forward(self, states: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, edges)
        return self.head(torch.zeros(int(graph.max()) + 1, 6).index_add(0, graph, states))


def batch(seed: int, count: int = 3) -> Graphs:
    """Rings of three nodes, with an edge more for each graph than for the one before."""
    states = torch.randn(3 * count, 4, generator=generator(seed))
    edges = [(3 * one + node, 3 * one + (node + 1) % 3) for one in range(count) for node in range(3)]
    edges += [(3 * one, 3 * one + 2) for one in range(1, count) for _ in range(one)]
    return states, torch.tensor(edges).T, torch.arange(count).repeat_interleave(3)


def sites(companions: bool = True) -> list[Site]:
    found = []
    for depth in range(2):
        parts = {"output": "message", "input[0]": "source", "input[1]": "target"}
        for port, tag in parts.items() if companions else [("output", "message")]:
            found.append(Site.parse(f"layers.{depth}.message:{port}", EDGE, tags=frozenset({tag}), depth=depth))
    return found


def hook(companions: bool = True) -> Hooked:
    return wrap(
        Net().eval(),
        sites=sites(companions),
        output=lambda logits: Categorical(logits=3 * logits),
        example_index=lambda graphs: graphs[2][graphs[1][0]],
        edges=lambda graphs: {"source": graphs[1][0] % 3, "target": graphs[1][1] % 3},
    )


def fitted(hooked: Hooked, **settings: object) -> GraphMask:
    explainer = GraphMask(hooked, **{"margin": 5.0, "recipe": QUICK, **settings})  # type: ignore[arg-type]
    explainer.fit([batch(1), batch(2)], [batch(3)], progress=False, accelerator="cpu")
    return explainer


def test_gates_read_source_message_and_target_of_their_layer() -> None:
    (group,) = GraphMask(hook()).groups
    first, second = group.maskings
    names = [str(site) for site in first.votes[0].reads]
    assert names == ["layers.0.message:input[0]", "layers.0.message:output", "layers.0.message:input[1]"]
    assert all(str(site).startswith("layers.1") for site in second.votes[0].reads)
    assert isinstance(first.votes[0].probe, SummedMLP)


def test_without_companions_gates_read_the_message() -> None:
    (group,) = GraphMask(hook(companions=False)).groups
    assert [[str(site) for site in masking.votes[0].reads] for masking in group.maskings] == [
        [f"layers.{depth}.message:output"] for depth in range(2)
    ]


def test_rows_are_edges_of_each_graph_in_each_layer() -> None:
    graphs = batch(9)
    explanation = fitted(hook()).explain(graphs)
    assert len(explanation) == 2 * graphs[1].shape[1]
    last = explanation.select(depth=1, example=2)
    assert last["position"].tolist() == list(range(5))
    assert last["label"].tolist() == ["0→1", "1→2", "2→0", "0→2", "0→2"]
    assert last["source"].tolist() == [0, 1, 2, 0, 0]
    assert explanation.metadata.keys() == {0, 1, 2}


def test_examples_without_edges_are_counted() -> None:
    states, edges, graph = batch(9)
    explainer = fitted(hook())
    lonely = (torch.cat([states, torch.zeros(1, 4)]), edges, torch.cat([graph, torch.tensor([3])]))
    both = explainer.explain_all([lonely, batch(4)])
    assert sorted(set(both["example"].tolist())) == [0, 1, 2, 4, 5, 6]
    assert both.metadata.keys() == set(range(7))


def test_tied_gates_have_the_rows_of_the_last_layer() -> None:
    explainer = fitted(hook(), tied=True)
    explanation = explainer.explain(batch(9))
    assert explanation.sites == ("layers.1.message:output",)
    assert len(explanation) == batch(9)[1].shape[1]
    (row,) = explainer.evaluate([batch(9)], progress=False)
    assert row["rounded_kept"] == pytest.approx(
        sum(explanation.select(example=one)["kept"].mean() for one in range(3)) / 3
    )


def test_without_amortisation_each_edge_has_a_gate_of_its_own() -> None:
    explainer = GraphMask(hook(), amortized=False, margin=0.02, recipe=dataclasses.replace(QUICK, steps=80), seed=3)
    states, edges, graph = batch(9)
    whole = explainer.explain((states, edges, graph))
    assert len(whole) == 2 * edges.shape[1]
    assert len(set(whole["score"].tolist())) > len(whole) // 2
    assert whole == explainer.explain((states, edges, graph))


def test_layers_join_from_the_top_down() -> None:
    explainer = fitted(hook(), recipe=dataclasses.replace(QUICK, steps=8, layer_warmup=0.5))
    first, last = (explainer.result.log[step]["site"] for step in (0, 7))
    assert first == "layers.1.message:output"
    assert last == "layers.0.message:output, layers.1.message:output"


@pytest.mark.parametrize("settings", [{}, {"tied": True, "divergence": prediction_loss}])
def test_it_is_loaded_as_it_was_saved(settings: dict[str, object], tmp_path: Path) -> None:
    hooked = hook()
    explainer = fitted(hooked, gate="hard-concrete-rounded", **settings)
    explainer.save(tmp_path)
    loaded = maskhooks.load(tmp_path, hooked)
    assert isinstance(loaded, GraphMask)
    assert loaded.settings() == explainer.settings()
    assert loaded.explain(batch(9)) == explainer.explain(batch(9))
    assert repr(loaded).startswith("GraphMask(2 maskings of 2 sites")


def test_a_model_without_messages_is_refused() -> None:
    with pytest.raises(UnknownSiteError, match="message"):
        GraphMask(wrap(nn.Linear(2, 2), sites={":output": "batch feature -> batch"}))


def test_each_value_read_counts_the_same_whatever_its_scale() -> None:
    torch.manual_seed(0)
    probe = SummedMLP(hidden=16)
    probe.start([3, 40], 2)
    values = [10 * torch.randn(7, 3), 10 * torch.randn(7, 40)]  # beside the norm's least variance
    logits = probe(values)
    assert logits.shape == (7, 2)
    assert torch.allclose(probe([1000 * values[0], 10 * values[1]]), logits, atol=0.01)
    assert not torch.allclose(probe([values[0].flip(0), values[1]]), logits, atol=0.1)
    assert probe([10 * value for value in values]).abs().max() <= 7


@pytest.mark.parametrize("rows", [3, 7, 5000])
def test_states_are_projected_instead_of_rows(rows: int) -> None:
    """Also in portions, or where rows are fewer; with the gradients of rows."""
    torch.manual_seed(0)
    probe = SummedMLP(hidden=16)
    probe.start([3, 4], 1)
    states, numbers, other = torch.randn(6, 3), torch.randint(6, (rows,)), torch.randn(rows, 4)
    for _ in range(2):
        found = []
        for value in (states[numbers], Picked(states, numbers)):
            with torch.no_grad():
                alone = probe([value, other])
            logits = probe([value, other])
            logits.square().mean().backward()
            found.append([alone, logits.detach(), *(weight.grad.clone() for weight in probe.parameters())])
            probe.zero_grad()
        assert all(torch.allclose(one, also, atol=1e-5) for one, also in zip(*found, strict=True))
        states = states.bfloat16()


class Pick(nn.Module):
    """Rows of states by numbers: a site that gates read as states and numbers."""

    def forward(self, states: Tensor, numbers: Tensor) -> Tensor:
        return states[numbers]


class Picking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.message, self.head = Pick(), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, states: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        sent = self.message(self.source(states, edges[0]))
        return self.head(torch.zeros(int(graph.max()) + 1, 6).index_add(0, graph[edges[1]], sent))


@pytest.mark.parametrize("probe", [SummedMLP, MLP])
def test_gates_read_states_and_numbers_in_place_of_rows(probe: type[Probe]) -> None:
    found = []
    for tags in ({"source"}, {"source", "picked"}):
        hooked = wrap(
            Picking(),
            sites=[
                Site.parse("source:output", EDGE, tags=frozenset(tags), depth=0),
                Site.parse("message:output", EDGE, tags=frozenset({"message"}), depth=0),
            ],
            call=lambda model, batch: model(*batch),
            output=lambda logits: Categorical(logits=logits),
            example_index=lambda batch: batch[2][batch[1][1]],
        )
        recipe = dataclasses.replace(QUICK, probe="summed" if probe is SummedMLP else "mlp")
        explainer = GraphMask(hooked, margin=5.0, recipe=recipe).fit([batch(1), batch(2)], [batch(3)], progress=False)
        assert type(explainer.maskings[0].votes[0].probe) is probe
        reads = [str(site) for site in explainer.reads]
        assert reads[1:] == (["source:input[0]", "source:input[1]"] if "picked" in tags else ["source:output"])
        found.append(torch.from_numpy(explainer.explain(batch(4))["score"]))
    assert torch.allclose(*found, atol=1e-5)
    assert found[0].std() > 1e-4
