"""Messages of PyTorch Geometric's layers: each a row between the right nodes, gated exactly, at the right depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.nn import (
    APPNP,
    ARMAConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GENConv,
    GINConv,
    PNAConv,
    RGCNConv,
    SAGEConv,
    SGConv,
    TAGConv,
    TransformerConv,
)

import maskhooks
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import onward_pass
from maskhooks.sites.places import Places
from tests.adapters.geometric_models import EDGES, Nodes, Pooled, batch, graph, randn
from tests.adapters.geometric_values import pairs, values
from tests.conftest import same_bits

Unchanged = Callable[[nn.Module], nn.Module]

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "gcn": lambda: GCNConv(3, 4),
    "gat": lambda: GATConv(3, 4, heads=2, edge_dim=None),
    "gatv2": lambda: GATv2Conv(3, 4, heads=2),
    "sage": lambda: SAGEConv(3, 4, aggr="max"),
    "gin": lambda: GINConv(nn.Linear(3, 4), train_eps=True),
    "tag": lambda: TAGConv(3, 4, K=2),
    "sg": lambda: SGConv(3, 4, K=2, cached=True),
    "appnp": lambda: APPNP(K=3, alpha=0.1, dropout=0.5),
    "arma": lambda: ARMAConv(3, 4, num_stacks=2, num_layers=2),
    "transformer": lambda: TransformerConv(3, 4, heads=2),
    "gen": lambda: GENConv(3, 4, aggr="softmax", learn_t=True),
    "pna": lambda: PNAConv(3, 4, ["mean", "std"], ["identity"], torch.tensor([0, 3, 2])),
    "target-to-source": lambda: GCNConv(3, 4, flow="target_to_source"),
}


def learned(value: Tensor, fill: float = 0.3) -> Learned:
    baseline = Learned()
    baseline.start(tuple(value.shape[1:]))
    with torch.no_grad():
        baseline.offset.fill_(fill)
    return baseline


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_messages_are_gated_exactly(name: str, unchanged: Unchanged) -> None:
    """Open gates leave the bits, closed ones let no gradient through, and the model is as it was."""
    model = CONVOLUTIONS[name]().train()
    with torch.no_grad(), frozen(model):
        model(randn(5, 3), EDGES)  # one of them keeps its states in a cache from then on
    unchanged(model)
    data = (randn(5, 3), EDGES)
    hooked = maskhooks.wrap(model)
    (site,) = hooked.sites.tagged("message")
    assert str(site) == "message:output"
    with torch.no_grad(), frozen(model):
        usual = hooked(data)
    value, edges = values(hooked, data, "message:output", "edges:output")
    assert len(value) == len(edges)
    masking = Masking(site, 0, [], HardConcrete(), learned(value))
    sampled = torch.tensor([0.0, 1.0, 0.4]).repeat(len(value))[: len(value)]
    for sample in (torch.ones(len(value)), torch.zeros(len(value)), sampled):
        begun: list[Tensor] = []

        def gate(part: Tensor, sample: Tensor = sample, begun: list[Tensor] = begun) -> Tensor:
            begin = sum(map(len, begun))
            begun.append(part.detach().clone().requires_grad_())
            mine = sample[begin : begin + len(part)]
            return masking.mask(begun[-1], Places(torch.ones(len(part), dtype=torch.bool)), mine).replaced

        with hooked.tap(replace={site: gate}):
            output = hooked(data)
        output.square().sum().backward()
        grads = torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in begun])
        if sample.all():
            assert same_bits(output.detach(), usual)
            assert grads.any()
        assert not grads[sample == 0].any()


def test_ends_are_those_that_the_layer_was_called_with() -> None:
    data = (randn(5, 3), EDGES)
    model = nn.ModuleDict({"gcn": GCNConv(3, 4), "gat": GATConv(3, 4), "sage": SAGEConv(3, 4)})
    loops = [(v, v) for v in range(5)]
    without = [pair for pair in pairs(EDGES.t()) if pair != (3, 3)]
    wanted = {"gcn": without + loops, "gat": without + loops, "sage": pairs(EDGES.t())}
    for name, layer in model.items():
        source, target, edges, x = values(
            maskhooks.wrap(layer), data, "source:output", "target:output", "edges:output", ":input"
        )
        assert pairs(edges) == wanted[name]
        assert edges[:, 2].eq(-1).all()
        assert not edges[:, 3].any()
        assert torch.equal(source, x[edges[:, 0]])
        assert torch.equal(target, x[edges[:, 1]])
    (flipped,) = values(maskhooks.wrap(SAGEConv(3, 4, flow="target_to_source")), data, "edges:output")
    assert pairs(flipped) == pairs(EDGES.flip(0).t())
    assert flipped[:, 3].all()


@pytest.mark.parametrize("name", [*CONVOLUTIONS, "relations", "again", "pair"])
def test_ends_are_rows_of_the_states(name: str) -> None:
    """Which are read with the numbers of rows instead, once for all portions of one layer's states."""
    made: dict[str, Callable[[], nn.Module]] = {"relations": lambda: RGCNConv(3, 4, 2), "pair": lambda: SAGEConv(3, 4)}
    prefix = "again." if name == "again" else ""
    data: Any = (randn(5, 3), EDGES)
    if name == "relations":
        data = (*data, torch.arange(EDGES.shape[1]) % 2)
    if name == "pair":
        data = ((randn(4, 3), randn(5, 3)), torch.tensor([[3, 0, 1, 1], [4, 4, 0, 2]]))
    hooked = maskhooks.wrap((Nodes if name == "again" else made.get(name) or CONVOLUTIONS[name])())
    for end in ("source", "target"):
        site = f"{prefix}{end}"
        rows, states, numbers = values(hooked, data, f"{site}:output", f"{site}:input", f"{site}:input[1]")
        assert same_bits(states[numbers], rows)
        (alone,) = values(hooked, data, f"{site}:input")
        assert same_bits(alone, states)
        if name == "relations":
            assert len(states) == 5, "both relations have the same states"


def test_a_row_tells_the_edge_of_the_batch() -> None:
    """Also where a layer drops a self-loop and adds it again, and where an edge occurs twice."""
    hooked, data = maskhooks.wrap(Pooled()), graph()
    rows = maskhooks.Random(hooked, "message").explain(data).select(site="second.message:output")
    assert rows["edge"].tolist() == [0, 1, 2, 4, 5, 6, -1, -1, -1, 3, -1]
    assert rows["label"].tolist()[:3] == ["0→1", "1→2", "2→0"]


def test_a_batch_of_graphs(unchanged: Unchanged) -> None:
    model = unchanged(Pooled())
    hooked, data = maskhooks.wrap(model, example=batch()), batch()
    explanation = maskhooks.Random(hooked, "message").explain(data)
    assert len(explanation.metadata) == 3
    for number, alone in enumerate(data.to_data_list()):
        one = maskhooks.Random(hooked, "message").explain(alone)
        mine = explanation.select(example=number)
        assert set(mine["site"]) == {"first.message:output", "second.message:output"}
        for site in one.sites:
            here, there = (part.select(site=site) for part in (mine, one))
            rows = [sorted(zip(e["source"], e["target"], e["edge"], strict=True)) for e in (here, there)]
            assert rows[0] == rows[1]
            assert sorted(here["position"]) == list(range(len(there)))
    assert [site.depth for site in hooked.sites.tagged("message")] == [0, 1]


def test_depths_follow_the_calls() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early = GCNConv(4, 4), GCNConv(3, 4)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.late(self.early(x, edge_index), edge_index)

    assert [site.module for site in maskhooks.wrap(Odd()).sites.tagged("message")] == ["late.message", "early.message"]
    known = maskhooks.wrap(Odd(), example=graph())
    assert [site.module for site in known.sites.tagged("message")] == ["early.message", "late.message"]
    assert [site.depth for site in known.sites.tagged("message")] == [0, 1]


def test_a_layer_used_again() -> None:
    hooked, data = maskhooks.wrap(Nodes()), graph()
    both, first, second = values(hooked, data, "again.message:output", *(f"again.message@{n}:output" for n in (0, 1)))
    assert torch.equal(both, torch.cat([first, second]))


@pytest.mark.parametrize(("made", "site"), [(Nodes, "again"), (lambda: TAGConv(3, 3, K=3), "")])
def test_each_use_and_hop_goes_along_the_edges(made: Callable[[], nn.Module], site: str, unchanged: Unchanged) -> None:
    """Also of those that occur twice; a node's messages to itself, which the layer adds, are along none."""
    model = unchanged(made())
    rows = maskhooks.Random(maskhooks.wrap(model), f"{site}.message:output".removeprefix(".")).explain(graph())
    along = rows["edge"].reshape(-1, 7)
    assert len(along) > 1
    assert (along[:, [0, 1, 2, 4, 5, 6]] == [0, 1, 2, 4, 5, 6]).all()
    assert set(along[:, 3].tolist()) <= {3, -1}


def test_states_of_a_layer_used_again() -> None:
    """With an example, a site for each call."""
    hooked = maskhooks.wrap(Nodes(), example=graph())
    nodes = [str(site) for site in hooked.sites.tagged("node")]
    assert nodes == [
        "first:input",
        "first:output",
        *(f"again@{n}:{port}" for port in ("input", "output") for n in (0, 1)),
    ]
    assert len(values(hooked, graph(), *nodes)) == 6


def test_a_later_portion_is_gated_as_it_comes() -> None:
    """With the first hop closed, the second sends what comes of that, not what it sent in the clean pass."""
    torch.manual_seed(0)
    model = TAGConv(3, 4, K=2, normalize=False).eval()
    hooked, data = maskhooks.wrap(model, output=lambda out: torch.distributions.Categorical(logits=out)), graph()
    hooked.task._examples = lambda given: torch.zeros(14, dtype=torch.long)  # type: ignore[assignment]
    site = hooked.sites["message:output"]
    clean = clean_pass(hooked, (data.x, data.edge_index), [site], [site], Replay(model))
    masking = Masking(site, 0, [], HardConcrete(), learned(clean.values[str(site)]))
    sample = torch.cat([torch.zeros(7), torch.ones(7)])
    masked = masking.mask(clean.values[str(site)], Places(torch.ones(14, dtype=torch.bool)), sample)
    with torch.no_grad():
        outputs: Any = onward_pass(clean, {site: masking.replacement(masked)})
        hop = data.x.new_zeros(5, 3).index_add(0, EDGES[1], torch.full((7, 3), 0.3))
        again = hop.new_zeros(5, 3).index_add(0, EDGES[1], hop[EDGES[0]])
        wanted = sum(lin(part) for lin, part in zip(model.lins, (data.x, hop, again), strict=True)) + model.bias
    assert torch.allclose(outputs.logits, wanted.log_softmax(-1), atol=1e-6)
