"""Messages of PyTorch Geometric's layers: each a row between the right nodes, exact, the model untouched."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch.distributions import Categorical
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import (
    APPNP,
    ARMAConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GENConv,
    GINConv,
    GraphConv,
    HANConv,
    HeteroConv,
    HGTConv,
    PNAConv,
    RGATConv,
    RGCNConv,
    SAGEConv,
    SGConv,
    TAGConv,
    TopKPooling,
    TransformerConv,
    global_add_pool,
    to_hetero,
)

import maskhooks
from maskhooks.checks.doctor import examine
from maskhooks.errors import (
    BatchError,
    CompiledModelError,
    ModelError,
    NotATensorError,
    ReplacementError,
    SettingError,
    SiteNeverFiredError,
    TappedModelError,
    UnfiredSiteWarning,
)
from maskhooks.hooks.frozen import frozen
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import Learned
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.masking import Masking
from maskhooks.model.hooked import Hooked
from maskhooks.passes.forward import clean_pass, onward_pass
from maskhooks.sites.site import Site
from tests.adapters.geometric_models import (
    EDGES,
    RELATIONS,
    TYPES,
    Nodes,
    Pooled,
    Relational,
    Typed,
    batch,
    graph,
    hetero,
    randn,
)
from tests.conftest import same_bits

Unchanged = Callable[[nn.Module], nn.Module]
LOOPS = torch.arange(5)

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


def values(hooked: Hooked, data: Any, *addresses: str) -> list[Tensor]:
    with torch.no_grad(), hooked.tap(read=list(addresses)) as tap:
        hooked(data)
    return [tap.values[address] for address in addresses]


def pairs(edges: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in edges[:, :2].tolist()]


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
            return masking.mask(begun[-1], torch.ones(len(part), dtype=torch.bool), mine).replaced

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
    assert len(explanation.examples) == 3
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


def test_relations_are_below_each_other() -> None:
    hooked = maskhooks.wrap(Relational())
    data = graph(edge_type=TYPES)
    message, edges, second = values(hooked, data, "conv.message:output", "conv.edges:output", "conv.message@1:output")
    order = torch.argsort(TYPES, stable=True)
    assert pairs(edges) == pairs(EDGES[:, order].t())
    assert edges[:, 2].tolist() == TYPES[order].tolist()
    assert torch.equal(second, message[edges[:, 2] == 1])
    rows = maskhooks.Random(hooked, "message").explain(data)
    assert rows["relation"].tolist() == TYPES[order].tolist()
    assert rows["edge"].tolist() == order.tolist()  # the edge 2 -> 0 is there once as relation 1, and once as 0
    one = maskhooks.Random(hooked, hooked.sites["conv.message:output"].at(1)).explain(data)
    assert one["edge"].tolist() == [2, 5]


def test_relations_that_go_along_in_one_call() -> None:
    hooked = maskhooks.wrap(RGATConv(3, 4, num_relations=3))
    (edges,) = values(hooked, (randn(5, 3), EDGES, TYPES), "edges:output")
    assert edges[:, 2].tolist() == TYPES.tolist()


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
    masked = masking.mask(clean.values[str(site)], torch.ones(14, dtype=torch.bool), sample)
    with torch.no_grad():
        outputs: Any = onward_pass(hooked, clean, site, masking.onto(masked))
        hop = data.x.new_zeros(5, 3).index_add(0, EDGES[1], torch.full((7, 3), 0.3))
        again = hop.new_zeros(5, 3).index_add(0, EDGES[1], hop[EDGES[0]])
        wanted = sum(lin(part) for lin, part in zip(model.lins, (data.x, hop, again), strict=True)) + model.bias
    assert torch.allclose(outputs.logits, wanted.log_softmax(-1), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "edge-index"])
def test_fused_sums_are_taken_apart_while_tapped(layout: str, unchanged: Unchanged) -> None:
    model = unchanged(SAGEConv(3, 4, aggr="sum").eval())
    x = randn(5, 3)
    order = torch.argsort(EDGES[1] * 5 + EDGES[0])  # as a sparse tensor has them, which adds up edges that occur twice
    kept = EDGES[:, order[[0, 2, 3, 4, 5, 6]]] if layout != "edge-index" else EDGES[:, order]
    adjacency: Any
    if layout == "edge-index":
        adjacency = EdgeIndex(kept, sparse_size=(5, 5), sort_order="col")
        adjacency.fill_cache_()
    else:
        adjacency = torch.sparse_coo_tensor(kept.flip(0), torch.ones(kept.shape[1]), (5, 5)).coalesce()
        adjacency = adjacency.to_sparse_csr() if layout == "csr" else adjacency
    hooked = maskhooks.wrap(model)
    with torch.no_grad():
        usual = model(x, adjacency)
        with hooked.tap(read=["message:output", "edges:output"]) as tap:
            opened = hooked((x, adjacency))
    assert torch.allclose(usual, opened, atol=1e-6)
    assert pairs(tap.values["edges:output"]) == pairs(kept.t())
    assert torch.equal(tap.values["message:output"], x[kept[0]])
    assert model.fuse


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
def test_a_layout_without_messages_is_refused(unchanged: Unchanged) -> None:
    model = unchanged(SAGEConv(3, 4))
    adjacency = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(7), (5, 5)).to_sparse_csc()
    hooked = maskhooks.wrap(model, call=lambda model, given: model(*given))
    with pytest.raises(BatchError, match=r"layout torch\.sparse_csc.*to_sparse_csr"), hooked.tap(read="message"):
        hooked((randn(5, 3), adjacency))


@pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_weights_that_only_the_fused_way_knows_are_refused(layout: str, unchanged: Unchanged) -> None:
    adjacency = torch.sparse_coo_tensor(EDGES[:, 1:].flip(0), torch.arange(1.0, 7.0), (5, 5)).coalesce()
    adjacency = adjacency.to_sparse_csr() if layout == "csr" else adjacency
    knows, model = GraphConv(3, 4), unchanged(SAGEConv(3, 4))
    hooked = maskhooks.wrap(model)
    with pytest.raises(BatchError, match=r"holds weights, by which SAGEConv.*Give an edge_index"):
        read(hooked, (randn(5, 3), adjacency))
    hooked = maskhooks.wrap(knows)
    with torch.no_grad(), hooked.tap(read="message") as tap:
        opened = hooked((randn(5, 3), adjacency))
    assert torch.allclose(opened, hooked.model(randn(5, 3), adjacency), atol=1e-6)
    assert len(tap.values["message:output"]) == 5


def test_decomposed_layers_are_whole_while_tapped(unchanged: Unchanged) -> None:
    model = unchanged(GCNConv(4, 4, decomposed_layers=2).eval())
    x = randn(5, 4)
    hooked = maskhooks.wrap(model)
    with torch.no_grad():
        usual = model(x, EDGES)
        with hooked.tap(read="message") as tap:
            assert same_bits(hooked((x, EDGES)), usual)
    assert tap.values["message:output"].shape == (11, 4)
    assert model.decomposed_layers == 2


def test_between_two_sets_of_nodes() -> None:
    hooked = maskhooks.wrap(SAGEConv((3, 2), 4))
    edges, sources, targets = torch.tensor([[0, 5, 2], [1, 0, 1]]), randn(6, 3), randn(2, 2)
    source, target = values(hooked, ((sources, targets), edges), "source:output", "target:output")
    assert torch.equal(source, sources[edges[0]])
    assert torch.equal(target, targets[edges[1]])
    with torch.no_grad(), hooked.tap(read=["source:output", "target:output", "message:output"]) as tap:
        hooked(((sources, None), edges))
        hooked(((sources, targets), edges))
    assert len(tap.values["target:output"]) == 3


def test_layers_without_states_of_those_that_receive() -> None:
    hooked = maskhooks.wrap(SAGEConv((3, 2), 4))
    given = ((randn(6, 3), None), torch.tensor([[0, 5, 2], [1, 0, 1]]))
    with pytest.warns(UnfiredSiteWarning, match="2 optional sites never fired: edge_target:output, target:output"):
        found = read(hooked, given)
    assert "target:output" not in found
    assert len(found["source:output"]) == 3


def read(hooked: Hooked, data: Any) -> Any:
    with torch.no_grad(), hooked.tap(read=["source", "target", "message"]) as tap:
        hooked(data)
    return tap.values


@pytest.mark.parametrize("made", ["HeteroConv", "to_hetero"])
def test_a_layer_for_each_relation(made: str, unchanged: Unchanged) -> None:
    data = hetero()
    if made == "HeteroConv":
        model: Any = Typed()
    else:

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.last = SAGEConv((-1, -1), 6), nn.LazyLinear(2)

            def forward(self, x: Tensor, edge_index: Tensor) -> Any:
                return self.last(self.conv(x, edge_index).relu())

        model = to_hetero(Plain(), data.metadata())
        with torch.no_grad():
            model(data.x_dict, data.edge_index_dict)
    unchanged(model)
    hooked = maskhooks.wrap(model, example=data)
    messages = hooked.sites.tagged("message")
    assert len(messages) == 3
    explanation = maskhooks.Random(hooked, "message").explain(data)
    seen = set()
    for site in explanation.sites:
        rows = explanation.select(site=site)
        (number,) = set(rows["relation"].tolist())
        edges = data[RELATIONS[number]].edge_index
        assert list(zip(rows["source"], rows["target"], strict=True)) == pairs(edges.t())
        assert rows["edge"].tolist() == list(range(edges.shape[1]))
        for column, kind in (("source_type", RELATIONS[number][0]), ("target_type", RELATIONS[number][2])):
            assert set(rows[column].tolist()) == {data.node_types.index(kind)}
        seen.add(number)
    assert seen == {0, 1, 2}


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("made", ["HeteroConv", "to_hetero"])
def test_layers_for_one_relation_each_have_one_depth(made: str) -> None:
    data = hetero()

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = ((3, 3), (6, 6))
            self.layers = nn.ModuleList([HeteroConv({key: SAGEConv(size, 6) for key in RELATIONS}) for size in wide])

        def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Any:
            for layer in self.layers:
                x_dict = {kind: x.tanh() for kind, x in layer(x_dict, edge_index_dict).items()}
            return x_dict["user"]

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SAGEConv((-1, -1), 6), SAGEConv((-1, -1), 6)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.second(self.first(x, edge_index).tanh(), edge_index)

    model: Any = Layers() if made == "HeteroConv" else to_hetero(Plain(), data.metadata())
    with torch.no_grad():
        model(data.x_dict, data.edge_index_dict)
    for example in (None, data):
        hooked = maskhooks.wrap(model, example=example)
        assert [site.depth for site in hooked.sites.tagged("message")] == [0, 0, 0, 1, 1, 1]
        assert [site.depth for site in hooked.sites.tagged("input")] == [0, 0, 0]
    explanation = maskhooks.Random(hooked, "message").explain(data)
    scores, depths, names = explanation.matrix()
    assert scores.shape == (2, 9) == (len(depths), len(names))
    assert depths == ["0", "1"]
    assert not (scores != scores).any()
    if made == "HeteroConv":  # by `to_hetero` films are predicted too, and a type alone is not asked about
        masks = maskhooks.GraphMask(hooked, recipe=maskhooks.Recipe(steps=2, stagger=0.5))
        with pytest.warns(UnfiredSiteWarning, match="rates"):
            masks.fit([data], [data], progress=False)
        assert [part.depth for part in masks.maskings[0].parts] == [0, 0, 0, 1, 1]
        assert [part.depth for part in masks.maskings[0].staged(0.0).parts] == [1, 1]
        assert masks.explain(data).matrix()[1] == ["0", "1"]


@pytest.mark.parametrize("kind", [HGTConv, HANConv])
def test_a_layer_for_all_relations(kind: Any) -> None:
    data = hetero()
    conv = kind(3, 4, metadata=data.metadata(), heads=2)
    hooked = maskhooks.wrap(conv, output=lambda out: torch.distributions.Categorical(logits=out["user"].sum(0)[None]))
    rows = maskhooks.Random(hooked, "message").explain(data)
    found = [
        (*RELATIONS[r], s, t, e)
        for r, s, t, e in zip(rows["relation"], rows["source"], rows["target"], rows["edge"], strict=True)
    ]
    wanted = [(*key, s, t, e) for key in RELATIONS for e, (s, t) in enumerate(pairs(data[key].edge_index.t()))]
    assert sorted(found) == sorted(wanted)


def test_an_edge_in_every_layer_at_once(unchanged: Unchanged) -> None:
    """Its weight scales its messages in all layers, whatever self-loops these add; open it changes no bit."""
    model = unchanged(Pooled())
    hooked, data = maskhooks.wrap(model, example=graph()), graph()
    (site,) = hooked.sites.tagged("edge")
    with torch.no_grad(), frozen(model):
        usual = hooked(data)
    with torch.no_grad():
        reads = [site, "edge_ends:output", "edge_source:output"]
        with hooked.tap(read=reads, replace={site: torch.clone}) as tap:
            assert same_bits(hooked(data), usual)
        assert torch.equal(tap.values[site], torch.ones(7, 1))
        assert pairs(tap.values["edge_ends:output"]) == pairs(EDGES.t())
        assert torch.equal(tap.values["edge_source:output"], data.x[EDGES[0]])
        for edge in range(7):
            weight = torch.ones(7, 1)
            weight[edge] = 0
            with hooked.tap(replace={site: lambda value, weight=weight: weight}):
                output = hooked(data)
            gcn = {3: 9}.get(edge, edge if edge < 3 else edge - 1)  # the self-loop at 3 comes after the others
            with hooked.tap(replace={f"{layer}.message:output": zero(gcn) for layer in ("first", "second")}):
                assert torch.equal(hooked(data), output)
            assert not torch.equal(output, usual)


def zero(row: int) -> Callable[[Tensor], Tensor]:
    return lambda value: torch.where(torch.arange(len(value))[:, None] == row, 0, value)


def portioned(row: int) -> Callable[[Tensor], Tensor]:
    """The same for a value that comes in portions."""
    seen: list[int] = []

    def replaced(part: Tensor) -> Tensor:
        begin = sum(seen)
        seen.append(len(part))
        return zero(row - begin)(part)

    return replaced


@pytest.mark.parametrize("amortized", [True, False])
def test_edges_of_a_batch_are_explained(amortized: bool, unchanged: Unchanged) -> None:
    model, data = Pooled(), batch()
    hooked = maskhooks.wrap(unchanged(model))
    explainer = maskhooks.DiffMask(hooked, "edge", recipe=maskhooks.Recipe(steps=4), amortized=amortized)
    if amortized:
        explainer.fit([data], progress=False)
    rows = explainer.explain(data)
    assert len(rows) == data.num_edges
    assert rows["example"].tolist() == data.batch[data.edge_index[0]].tolist()
    assert rows["position"].tolist() == rows["edge"].tolist()
    with pytest.raises(SettingError, match="no baseline can be learned"):
        maskhooks.DiffMask(hooked, "edge", baseline="learned")


@pytest.mark.filterwarnings("ignore::maskhooks.errors.MarginWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, unchanged: Unchanged) -> None:
    model, data = Pooled().to(dtype), graph()
    data.x = data.x.to(dtype)
    hooked = maskhooks.wrap(unchanged(model))
    for site, rows in (("first.message:output", 11), ("edge", 7)):
        masks = maskhooks.DiffMask(hooked, site, amortized=False, recipe=maskhooks.Recipe(steps=2))
        assert len(masks.explain(data)) == rows


def test_edges_of_all_types_at_once() -> None:
    data = hetero()
    rows = maskhooks.Random(maskhooks.wrap(Typed()), "edge").explain(data)
    found = list(zip(rows["relation"], rows["source"], rows["target"], rows["edge"], strict=True))
    assert sorted(found) == sorted(
        (n, s, t, e) for n, key in enumerate(RELATIONS) for e, (s, t) in enumerate(pairs(data[key].edge_index.t()))
    )


@pytest.mark.parametrize("made", ["HeteroConv", "to_hetero"])
def test_types_with_the_same_numbers_at_once(made: str) -> None:
    """As where each user has one film: the numbers of nodes do not say of which type an edge is."""
    data = hetero()
    for relation in RELATIONS:
        data[relation].edge_index = torch.tensor([[0, 1, 2], [0, 2, 1]])
    if made == "HeteroConv":
        model: Any = Typed()
    else:

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = SAGEConv((-1, -1), 6), SAGEConv((-1, -1), 2)

            def forward(self, x: Tensor, edge_index: Tensor) -> Any:
                return self.second(self.first(x, edge_index).relu(), edge_index)

        model = to_hetero(Plain(), data.metadata())
        with torch.no_grad():
            model(data.x_dict, data.edge_index_dict)
    rows = maskhooks.Random(maskhooks.wrap(model), "edge").explain(data)
    assert sorted(zip(rows["relation"], rows["edge"], strict=True)) == [(n, e) for n in range(3) for e in range(3)]


def test_a_layer_that_runs_by_itself() -> None:
    model = Pooled()
    hooked = maskhooks.wrap(model, call=lambda model, data: model.first(data.x, data.edge_index))
    with torch.no_grad(), hooked.tap(read="first.message:output") as tap:
        hooked(graph())
    assert len(tap.values["first.message:output"]) == 11
    with torch.no_grad(), hooked.tap(read="edge") as tap:  # what is called for a batch is a pass
        hooked(graph())
    assert len(tap.values["edge:output"]) == 7
    with pytest.raises(ModelError, match="a layer of Pooled runs by itself"), hooked.tap(read="edge"):
        model.first(graph().x, EDGES)


def test_lists_of_edges_between_states_of_several_widths(unchanged: Unchanged) -> None:
    """Layers with edges of their own, as of types of nodes or of nearest neighbours, in one `edge`."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GCNConv(3, 6), SAGEConv(6, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            hidden: Tensor = self.second(self.first(x, edge_index), edge_index[:, [0, 2, 4]].flip(0))
            return hidden

    hooked = maskhooks.wrap(unchanged(Two()), example=graph())
    found = values(hooked, graph(), "edge_source:output", "edge:output")
    assert [list(value.shape) for value in found] == [[10, 6], [10, 1]]
    assert torch.equal(found[0][:7, :3], graph().x[EDGES[0]])
    assert not found[0][:7, 3:].any()
    assert found[0][7:].all()
    rows = maskhooks.GraphMask(hooked, "edge", recipe=maskhooks.Recipe(steps=2)).fit([graph()], progress=False)
    assert rows.explain(graph())["edge"].tolist() == [0, 1, 2, 3, 4, 5, 6, -1, -1, -1]


def test_one_weight_whatever_the_flow_and_whether_relations_are_told_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.against = SAGEConv(3, 4), GCNConv(4, 4, flow="target_to_source")
            self.typed = RGCNConv(4, 2, num_relations=3)

        def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor) -> Any:
            return self.typed(self.against(self.plain(x, edge_index), edge_index), edge_index, edge_type)

    model, data = Mixed().eval(), graph(edge_type=TYPES)
    hooked = maskhooks.wrap(model)
    messages = ["plain.message:output", "against.message:output", "typed.message:output"]
    numbers = {site: maskhooks.Random(hooked, site).explain(data)["edge"] for site in messages}
    assert maskhooks.Random(hooked, "edge").explain(data)["edge"].tolist() == list(range(7))
    for edge in (0, 2, 4, 6):
        places = {site: int(np.flatnonzero(rows == edge)[0]) for site, rows in numbers.items()}
        by_hand = {site: portioned(row) if "typed" in site else zero(row) for site, row in places.items()}
        with torch.no_grad(), hooked.tap(replace=by_hand):
            wanted = hooked(data)
        with torch.no_grad(), hooked.tap(replace={"edge": zero(edge)}):
            assert torch.allclose(hooked(data), wanted)


def test_edges_that_a_model_draws_do_not_take_the_numbers_of_given_ones() -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SAGEConv(3, 4), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.second(self.first(x, edge_index[:, :3].flip(1)), edge_index)

    rows = maskhooks.Random(maskhooks.wrap(Drawn().eval(), example=graph()), "edge").explain(graph())
    assert rows["edge"].tolist() == [2, 1, 0, *range(7)]


@pytest.mark.parametrize("made", [lambda: TAGConv(3, 4, K=3), Relational, Nodes])
def test_one_weight_for_many_hops_relations_and_uses(made: Callable[[], nn.Module]) -> None:
    model = made()
    given: Any = (randn(5, 3), EDGES, TYPES)
    if not isinstance(model, Relational):
        given = given[:2]
    hooked = maskhooks.wrap(model)
    with torch.no_grad():
        with hooked.tap(read="edge", replace={"edge": torch.zeros_like}) as tap:
            closed = hooked(given)
        with hooked.tap(replace={"message": torch.zeros_like}):
            assert torch.equal(hooked(given), closed)
    assert tap.values["edge:output"].shape == (7, 1)


def test_nothing_is_left_behind(unchanged: Unchanged) -> None:
    model = unchanged(Pooled())
    hooked, data = maskhooks.wrap(model), graph()
    with pytest.raises(RuntimeError, match="mine"), hooked.tap(replace={"message": torch.clone}):
        raise RuntimeError("mine")

    def broken(value: Tensor) -> Tensor:
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"), hooked.tap(replace={"first.message:output": broken}):
        hooked(data)
    with hooked.tap(read="message"):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TappedModelError, match="tapped"):
                copied(model)
        hooked(data)
    copy.deepcopy(model)
    pickle.dumps(model)


def test_a_cache_of_normalised_edges_is_as_it_was(unchanged: Unchanged) -> None:
    model = unchanged(GCNConv(3, 4, cached=True))
    hooked = maskhooks.wrap(model)
    values(hooked, (randn(5, 3), EDGES), "message:output")
    assert model._cached_edge_index is None


def test_taps_nest() -> None:
    hooked, data = maskhooks.wrap(Pooled()), graph()
    site = "first.message:output"
    with torch.no_grad(), hooked.tap(replace={site: torch.zeros_like}), hooked.tap(read=site) as inner:
        hooked(data)
        assert not inner.values[site].any()
    with torch.no_grad(), hooked.tap(read=site) as tap:
        hooked(data)
        assert tap.values[site].any()


def test_copies_of_a_hooked_have_messages() -> None:
    twin = copy.deepcopy(maskhooks.wrap(Pooled()))
    assert len(values(twin, graph(), "first.message:output")[0]) == 11


def test_what_is_only_read_is_not_replaced() -> None:
    hooked = maskhooks.wrap(Pooled())
    with (
        pytest.raises(ReplacementError, match="can only be read"),
        hooked.tap(replace={"first.source:output": torch.zeros_like}),
    ):
        hooked(graph())


def test_the_doctor_knows_messages() -> None:
    report = examine(maskhooks.wrap(Pooled()), batch())
    assert report.healthy
    rows = {row["site"]: row for row in report.rows()}
    assert rows["first.source:output"]["bypassed"] == "only read"
    assert rows["first.message:output"]["trouble"] == ""
    assert not any(row["foreign hooks"] for row in rows.values())


def test_a_message_that_is_no_row_an_edge(unchanged: Unchanged) -> None:
    class Odd(SAGEConv):
        def message(self, x_j: Tensor) -> Any:
            return x_j[:-1]

    hooked = maskhooks.wrap(unchanged(Odd(3, 4)))
    with pytest.raises(ModelError, match=r"returned a tensor \[6, 3\] for 7 edges"), hooked.tap(read="message"):
        hooked((randn(5, 3), EDGES))


def test_portions_of_several_widths() -> None:
    class Odd(SAGEConv):
        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.propagate(edge_index, x=x).sum() + self.propagate(edge_index, x=x[:, :2]).sum()

    hooked = maskhooks.wrap(Odd(3, 4))
    with pytest.raises(NotATensorError, match="Address one call, as 'message@0:output'"), hooked.tap(read="message"):
        hooked((randn(5, 3), EDGES))
    assert values(hooked, (randn(5, 3), EDGES), "message@1:output")[0].shape == (7, 2)


def test_a_layer_that_goes_its_own_way() -> None:
    class Odd(SAGEConv):
        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return x.new_zeros(5, 4).index_add(0, edge_index[1], self.lin_l(x)[edge_index[0]])

    hooked = maskhooks.wrap(Odd(3, 4))
    with pytest.raises(SiteNeverFiredError, match="message"), hooked.tap(read="message"):
        hooked((randn(5, 3), EDGES))


def test_pooled_nodes_are_not_taken_for_those_of_the_batch() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pool, self.second = SAGEConv(3, 4), TopKPooling(4, ratio=3), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Any:
            x, edges, _, batch, _, _ = self.pool(self.first(x, edge_index), edge_index, None, batch)
            return global_add_pool(self.second(x, edges), batch)

    torch.manual_seed(0)
    hooked = maskhooks.wrap(Pooling())
    path = graph(6, torch.tensor([[0, 1, 2, 3, 4, 5, 2, 4, 1], [1, 2, 3, 4, 5, 0, 5, 2, 4]]))
    rows = maskhooks.Random(hooked, "message").explain(path)
    assert (rows.select(site="first.message:output")["edge"] >= 0).all()
    assert (rows.select(site="second.message:output")["edge"] == -1).all()
    with pytest.raises(BatchError, match=r"second.message.*other nodes than the batch, as after pooling"):
        maskhooks.Random(hooked, "message").explain(Batch.from_data_list([path, path]))


def test_layers_with_the_first_nodes_of_a_sampled_graph() -> None:
    class Trimmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SAGEConv(3, 4), SAGEConv(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.second(self.first(x, edge_index)[:3], edge_index[:, :3])

    rows = maskhooks.Random(
        maskhooks.wrap(Trimmed(), level="graph", output=lambda out: Categorical(logits=out.sum(0)[None])),
        "second.message:output",
    ).explain(graph())
    assert rows["edge"].tolist() == [0, 1, 2]


def test_names_that_a_model_has_taken() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge = SAGEConv(3, 4)
            self.edge.source = nn.Linear(1, 1)

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            return self.edge(x, edge_index)

    assert [str(site) for site in maskhooks.wrap(Taken()).sites] == ["edge:input", "edge:output"]


@pytest.mark.filterwarnings("ignore:There exist node types:UserWarning")
@pytest.mark.parametrize("kinds", [("a", "ba"), ("user", "super_user")])
def test_types_whose_names_contain_each_other(kinds: tuple[str, str]) -> None:
    one, other = ((kind, "to", "b") for kind in kinds)
    data = HeteroData()
    for kind in (*kinds, "b"):
        data[kind].x = randn(3, 3)
    data[one].edge_index, data[other].edge_index = torch.tensor([[0], [1]]), torch.tensor([[1, 2], [0, 1]])
    conv = HeteroConv({one: SAGEConv((3, 3), 2), other: SAGEConv((3, 3), 2)})
    hooked = maskhooks.wrap(conv, output=lambda out: Categorical(logits=out["b"].sum(0)[None]))
    rows = maskhooks.Random(hooked, "message").explain(data)
    assert rows["relation"].tolist() == [0, 1, 1]
    assert rows["edge"].tolist() == [0, 0, 1]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_models_are_refused() -> None:
    compiled = torch.compile(Pooled(), backend="eager")
    with pytest.raises(CompiledModelError, match="_orig_mod"):
        maskhooks.wrap(compiled)
    model = Pooled()
    hooked, later = maskhooks.wrap(model), torch.compile(model, backend="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's, of a compiled module under a tap
        with pytest.raises(SiteNeverFiredError, match=r"first\.message"), hooked.tap(read="message"):
            later(graph().x, EDGES)
    part = Pooled()
    part.first.compile(backend="eager")
    with pytest.raises(CompiledModelError, match="first"):
        maskhooks.wrap(part)


def test_a_network_without_the_library() -> None:
    """A site on a message module of its own."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
            sent = self.message(x[edge_index[0]])
            hidden = sent.new_zeros(len(x), 4).index_add(0, edge_index[1], sent)
            return self.last(hidden.new_zeros(int(batch.max()) + 1, 4).index_add(0, batch, hidden))

    hooked = maskhooks.wrap(
        Own(),
        sites={"message:output": "edge feature -> edge"},
        output=lambda out: torch.distributions.Categorical(logits=out),
        examples=lambda given: given["batch"][given["edge_index"][1]],
        edges=lambda given: {"source": given["edge_index"][0], "target": given["edge_index"][1]},
    )
    data = batch()
    rows = maskhooks.Random(hooked, "message:output").explain(
        {"x": data.x, "edge_index": data.edge_index, "batch": data.batch}
    )
    assert rows["example"].tolist() == data.batch[data.edge_index[1]].tolist()
    assert rows["source"].tolist() == data.edge_index[0].tolist()


def test_sites_are_parsed() -> None:
    hooked = maskhooks.wrap(Pooled())
    for site in hooked.sites:
        assert str(Site.parse(str(site))) == str(site)
