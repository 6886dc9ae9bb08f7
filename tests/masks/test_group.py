"""Several maskings in one pass, on a small graph network of two layers and a sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from maskhooks.distributed.ranks import Shard
from maskhooks.errors import BatchError, PatternError
from maskhooks.hooks.replay import Replay
from maskhooks.masks.baselines import Learned, Zero
from maskhooks.masks.gates import HardConcrete
from maskhooks.masks.group import MaskingGroup
from maskhooks.masks.masking import Masking
from maskhooks.masks.probes import MLP, PerExampleLogits
from maskhooks.masks.samples import GateSamples
from maskhooks.masks.votes import Vote
from maskhooks.model.hooked import Hooked
from maskhooks.model.outputs import kl
from maskhooks.model.wrapping import wrap
from maskhooks.passes.clean import clean_pass
from maskhooks.passes.masked import masked_pass
from maskhooks.seeds import generator
from maskhooks.sites.site import Site
from maskhooks.training.preparation import closed_divergence, gather, random_mask

SITES = ["layers.0.message:output", "layers.1.message:output"]
# Two graphs side by side, of three edges and one; a third without any.
EDGES = torch.tensor([[0, 1, 2, 4], [1, 2, 0, 3]])
GRAPH = torch.tensor([0, 0, 0, 1, 1, 2])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(4, 4)

    def forward(self, states: Tensor, edges: Tensor) -> Tensor:
        sums = torch.zeros_like(states).index_add(0, edges[1], self.message(states[edges[0]]))
        return torch.tanh(sums + states)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 3)

    def forward(self, states: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, edges)
        return self.head(torch.zeros(3, 4).index_add(0, graph, states))


@pytest.fixture
def hooked() -> Hooked:
    return wrap(
        Net().eval(),
        sites=dict.fromkeys(SITES, "edge feature -> edge"),
        output=lambda logits: Categorical(logits=3 * logits),
        example_index=lambda batch: batch[2][batch[1][1]],
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 4, generator=generator(1)), EDGES, GRAPH


def parts(hooked: Hooked, batch: object, shared: Vote | None = None) -> list[Masking]:
    torch.manual_seed(0)
    found = [
        Masking(
            site, number, [shared or Vote((site,), MLP())], HardConcrete(), Learned(torch.full((4,), float(number)))
        )
        for number, site in enumerate(hooked.sites)
    ]
    gather(hooked, found, [batch], torch.device("cpu"))
    return found


def test_open_gates_leave_the_output_equal_bit_for_bit(hooked, batch) -> None:
    group = MaskingGroup(parts(hooked, batch))
    clean = clean_pass(hooked, batch, group.reads)
    masked, outputs = masked_pass(clean, group, rounded=1e-9)
    assert bool((masked.sample == 1).all())
    assert torch.equal(outputs.logits, clean.outputs.logits)


def test_all_sites_are_masked_at_once(hooked, batch) -> None:
    """A later layer's messages are those of the masked pass, mixed with its own baseline."""
    group = MaskingGroup(parts(hooked, batch))
    clean = clean_pass(hooked, batch, group.reads)
    masked, outputs = masked_pass(clean, group, generator(3))
    samples = masked.sample.split(4)
    net = hooked.model
    states = batch[0]
    for number, layer in enumerate(net.layers):
        z = samples[number][:, None]
        messages = z * layer.message(states[EDGES[0]]) + (1 - z) * number
        states = torch.tanh(torch.zeros_like(states).index_add(0, EDGES[1], messages) + states)
    wanted = net.head(torch.zeros(3, 4).index_add(0, GRAPH, states))
    assert torch.allclose(outputs.logits, Categorical(logits=3 * wanted).logits, atol=1e-6)
    assert len(set(samples[0].tolist())) > 1


def test_replay_gives_the_same_from_the_first_site_onward(hooked, batch) -> None:
    group = MaskingGroup(parts(hooked, batch))
    replay = Replay(hooked.model)
    full = clean_pass(hooked, batch, group.reads)
    kept = clean_pass(hooked, batch, group.reads, hooked.sites, replay)
    _, one = masked_pass(full, group, generator(3))
    _, other = masked_pass(kept, group, generator(3))
    assert torch.equal(one.logits, other.logits)


def test_gradients_reach_probes_and_baselines_of_all_parts(hooked, batch) -> None:
    group = MaskingGroup(parts(hooked, batch))
    clean = clean_pass(hooked, batch, group.reads)
    _, outputs = masked_pass(clean, group, generator(3))
    kl(clean.outputs, outputs).sum().backward()
    assert all(bool(module.offset.grad.any()) for module in group.modules if isinstance(module, Learned))
    assert all(bool(module.last.weight.grad.any()) for module in group.modules if isinstance(module, MLP))


def test_means_are_over_the_edges_of_each_graph_in_all_layers(hooked, batch) -> None:
    group = MaskingGroup(parts(hooked, batch))
    clean = clean_pass(hooked, batch, group.reads)
    masked, _ = masked_pass(clean, group, generator(3))
    first, second = masked.sample.view(2, 4)[:, :3], masked.sample.view(2, 4)[:, 3]
    assert torch.allclose(
        masked.per_example(masked.sample), torch.stack([first.mean(), second.mean(), torch.zeros(())])
    )
    flat = GateSamples.flattened([masked])
    assert torch.equal(flat.sample, masked.sample)
    assert torch.equal(flat.per_example(flat.sample), masked.per_example(masked.sample))


def test_layers_join_from_the_top_down(hooked, batch) -> None:
    group = MaskingGroup(parts(hooked, batch))
    assert group.last_depths(0.0).maskings == group.maskings[1:]
    assert group.last_depths(0.5).maskings == group.maskings
    assert MaskingGroup(group.maskings[:1]).last_depths(0.0).maskings == group.maskings[:1]
    assert MaskingGroup(group.maskings, tied=True).last_depths(0.0).maskings == group.maskings
    for masking, depth in zip(group.maskings, (0, 0), strict=True):
        masking.depth = depth
    assert group.last_depths(0.0).maskings == group.maskings  # of one depth, which join together


def test_tied_gates_are_those_of_the_first_site(hooked, batch) -> None:
    site = hooked.sites[1]
    group = MaskingGroup(parts(hooked, batch, Vote((site,), MLP())), tied=True)
    clean = clean_pass(hooked, batch, group.reads)
    masked, _ = masked_pass(clean, group, generator(3))
    assert torch.equal(masked.sample[:4], masked.sample[4:])
    assert torch.equal(masked.log_open[:4], masked.log_open[4:])
    assert 0 < masked.sample.mean() < 1


def test_tied_gates_need_as_many_edges(batch) -> None:
    hooked = wrap(
        Net().eval(),
        sites=dict.fromkeys(SITES, "edge feature -> edge"),
        output=lambda logits: Categorical(logits=logits),
    )
    group = MaskingGroup(parts(hooked, batch), tied=True)
    clean = clean_pass(hooked, batch, group.reads)
    clean.values[SITES[1]] = clean.values[SITES[1]][:3]
    with pytest.raises(PatternError, match="cannot be tied"):
        masked_pass(clean, group, generator(3))


def test_closing_all_sites(hooked, batch) -> None:
    group = MaskingGroup(parts(hooked, batch))
    clean = clean_pass(hooked, batch, group.reads)
    far = closed_divergence(clean, group, kl)
    assert far.shape == (3,)
    assert far[0] > 0
    assert far[2] == 0  # it has no edge


def test_random_masks_have_a_rate_for_each_graph(hooked, batch) -> None:
    masking = parts(hooked, batch)[0]
    clean = clean_pass(hooked, batch, masking.reads)
    shares = Shard(0, (4,)), Shard(0, (3,))
    found = torch.stack([random_mask(clean, masking, generator(number), *shares).sample for number in range(300)])
    together_ = torch.corrcoef(found.T)
    assert together_[0, 1] > 0.2  # one graph
    assert together_[0, 3].abs() < 0.2  # two


def test_free_logits_are_one_for_each_edge(hooked, batch) -> None:
    site = hooked.sites[0]
    masking = Masking(site, 0, [Vote((), PerExampleLogits())], HardConcrete(), Zero())
    gather(hooked, [masking], [batch], torch.device("cpu"))
    masking.votes[0].probe.begin([4], torch.device("cpu"))
    clean = clean_pass(hooked, batch, masking.reads)
    masked, _ = masked_pass(clean, MaskingGroup([masking]), generator(3))
    assert masked.sample.shape == (4,)


@pytest.mark.parametrize("given", [torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0, 3]), torch.tensor([-1, 0, 0, 1])])
def test_examples_that_do_not_fit_are_refused(batch, given: Tensor) -> None:
    hooked = wrap(
        Net().eval(),
        sites=dict.fromkeys(SITES, "edge feature -> edge"),
        output=lambda logits: Categorical(logits=logits),
        example_index=lambda batch: given,
    )
    masking = Masking(hooked.sites[0], 0, [Vote((hooked.sites[0],), MLP())], HardConcrete(), Zero())
    gather(hooked, [masking], [batch], torch.device("cpu"))
    clean = clean_pass(hooked, batch, masking.reads)
    with pytest.raises(BatchError, match="4 positions of 3 examples"):
        masked_pass(clean, MaskingGroup([masking]), generator(3))
    assert isinstance(hooked.sites[0], Site)
