"""The coloured stars of Schlichtkrull et al. 2021: do more edges have one colour than another?

A star has six to twelve leaves, a coloured edge from each leaf to the centre, and a query of two colours x and y. The
label is 1 if more edges are x than y. A prediction needs only the edges of these two colours, so the truth is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.distributions import Bernoulli

from maskhooks.explanations.explanation import Explanation
from maskhooks.model.hooked import Hooked
from maskhooks.model.wrapping import wrap
from maskhooks.sites.site import Site

COLOURS, FEWEST, MOST = 6, 6, 12
MESSAGE = "layer.message:output"
SOURCE, TARGET = "layer.message:input[0]", "layer.message:input[1]"


class Graphs(NamedTuple):
    """A batch of stars as one graph, in the model's format.

    `features` of nodes; `edges` as source and target; a `colour` for each edge; `centre`: each star's centre, its last
    node.
    """

    features: Float[Tensor, "node feature"]
    edges: Int[Tensor, "2 edge"]
    colour: Int[Tensor, " edge"]
    centre: Int[Tensor, " star"]

    @property
    def star(self) -> Int[Tensor, " edge"]:
        """The star index of each edge."""
        return torch.searchsorted(self.centre, self.edges[1])


@dataclass(frozen=True)
class Stars:
    """Examples of the task, one per row: the two query colours, the colours of edges, and which edges exist."""

    query: Int[Tensor, "star 2"]
    colour: Int[Tensor, "star leaf"]
    valid: Bool[Tensor, "star leaf"]

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, rows: slice | Tensor) -> Stars:
        return Stars(self.query[rows], self.colour[rows], self.valid[rows])

    @property
    def label(self) -> Float[Tensor, " star"]:
        """1 where the first colour asked for occurs more often than the second, else 0."""
        first, second = (self._equals(which).sum(1) for which in (0, 1))
        return (first > second).float()

    def truth(self) -> Bool[Tensor, " edge"]:
        """Return whether each edge of all stars, star by star, has a query colour."""
        return (self._equals(0) | self._equals(1))[self.valid]

    def graphs(self) -> Graphs:
        """Return all stars as one batch."""
        leaves = self.valid.sum(1)
        centre = (leaves + 1).cumsum(0) - 1
        target = centre.repeat_interleave(leaves)
        is_leaf = torch.ones(int(centre[-1]) + 1, dtype=torch.bool)
        is_leaf[centre] = False
        asked = F.one_hot(self.query, COLOURS).flatten(1).float()
        features = asked.new_full((len(is_leaf), 2 * COLOURS), -1.0)
        features[is_leaf] = asked.repeat_interleave(leaves, 0)
        return Graphs(features, torch.stack([is_leaf.nonzero()[:, 0], target]), self.colour[self.valid], centre)

    def batches(self, size: int = 128) -> list[Graphs]:
        """Return batches of stars, in order."""
        return [self[start : start + size].graphs() for start in range(0, len(self), size)]

    def _equals(self, which: int) -> Bool[Tensor, "star leaf"]:
        return (self.colour == self.query[:, which, None]) & self.valid


def generate(count: int = 11_000, seed: int = 0) -> tuple[Stars, Stars, Stars]:
    """Generate training, validation and test examples (the last two have 500 each, or an eleventh if that is fewer).

    The number of leaves is uniform from 6 to 12; the colour of each edge is uniform over six.
    """
    generator = torch.Generator().manual_seed(seed)
    query = torch.rand(count, COLOURS, generator=generator).argsort(1)[:, :2]
    colour = torch.randint(0, COLOURS, (count, MOST), generator=generator)
    leaves = torch.randint(FEWEST, MOST + 1, (count, 1), generator=generator)
    valid = torch.arange(MOST) < leaves
    data = Stars(query, torch.where(valid, colour, -1), valid)
    held = min(500, count // 11)
    return data[: count - 2 * held], data[count - 2 * held : count - held], data[count - held :]


class Message(nn.Module):
    """An edge's message: ReLU(LayerNorm(W_r h_source + b_r)), with weights for each relation r."""

    def __init__(self, size: int, relations: int) -> None:
        super().__init__()
        self.relations = nn.Linear(size, relations * size)
        self.norm = nn.LayerNorm(size)

    def forward(
        self,
        source: Float[Tensor, "edge feature"],
        target: Float[Tensor, "edge feature"],
        relation: Int[Tensor, " edge"],
    ) -> Float[Tensor, "edge feature"]:
        """Return messages; they do not depend on the target's states, which are inputs so that probes can read them."""
        every = self.relations(source).view(len(source), -1, source.shape[1])
        own = every[torch.arange(len(source), device=source.device), relation]
        message: Tensor = torch.relu(self.norm(own))
        return message


class RGCN(nn.Module):
    """A relational graph convolution (Schlichtkrull et al. 2018): messages are summed, then a dense update."""

    def __init__(self, size: int, relations: int) -> None:
        super().__init__()
        self.message = Message(size, relations)
        self.update = _dense(2 * size, size)

    def forward(
        self,
        states: Float[Tensor, "node feature"],
        edges: Int[Tensor, "2 edge"],
        relation: Int[Tensor, " edge"],
    ) -> Float[Tensor, "node feature"]:
        """The states of the nodes after one round of messages."""
        messages = self.message(states[edges[0]], states[edges[1]], relation)
        sums = torch.zeros_like(states).index_add(0, edges[1], messages)
        updated: Tensor = self.update(torch.cat([sums, states], -1))
        return updated


class StarsModel(nn.Module):
    """The paper's network for this task: node embeddings, one relational convolution, a head on the centre."""

    def __init__(self, size: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Sequential(_dense(2 * COLOURS, size), _dense(size, size), _dense(size, size))
        self.layer = RGCN(size, COLOURS)
        self.head = nn.Sequential(_dense(size, 2 * size), _dense(2 * size, size), nn.Linear(size, 1))

    def forward(
        self,
        features: Float[Tensor, "node feature"],
        edges: Int[Tensor, "2 edge"],
        colour: Int[Tensor, " edge"],
        centre: Int[Tensor, " star"],
    ) -> Float[Tensor, " star"]:
        """Return the logits of the label."""
        states = self.layer(self.embedding(features), edges, colour)
        logits: Tensor = self.head(states[centre]).squeeze(-1)
        return logits


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())


def train_model(
    train: Stars, *, seed: int = 0, epochs: int = 8, learning_rate: float = 3e-3, size: int = 100
) -> Iterator[tuple[int, StarsModel]]:
    """Train the model, yielding (epoch, model) after each epoch; the last model is final.

    Adam, batches of 128, linear decay over the second half; `size` is the hidden size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StarsModel(size)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    steps = -(-len(train) // 128) * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(train), generator=generator).split(128):
            batch = train[rows]
            loss = F.binary_cross_entropy_with_logits(model(*batch.graphs()), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch, model.eval()


@torch.no_grad()
def accuracy(model: StarsModel, data: Stars) -> float:
    """Return the fraction of correct predictions."""
    return float(((model(*data.graphs()) > 0) == data.label.bool()).float().mean())


class Quality(NamedTuple):
    """Kept edges compared with the truth, pooled over all stars."""

    precision: float
    recall: float
    f1: float


def quality(kept: Bool[Tensor, " edge"], data: Stars) -> Quality:
    """Compare the kept edges with those of a query colour; all zero if nothing is kept."""
    truth = data.truth()
    hits = int((kept & truth).sum())
    precision, recall = hits / max(1, int(kept.sum())), hits / int(truth.sum())
    return Quality(precision, recall, 2 * hits / (int(kept.sum()) + int(truth.sum())))


def kept(explanation: Explanation) -> Bool[Tensor, " edge"]:
    """Return which edges an explanation of all stars keeps, in the order of `Stars.truth`."""
    return torch.from_numpy(explanation["kept"])


def hook(model: nn.Module) -> Hooked:
    """Wrap the model without any plugin: messages, and the states of both ends of each edge."""
    pattern = "edge feature -> edge"
    return wrap(
        model,
        sites=[
            Site.parse(address, pattern, tags=frozenset({tag}), depth=0)
            for address, tag in ((MESSAGE, "message"), (SOURCE, "source"), (TARGET, "target"))
        ],
        output=lambda logits: Bernoulli(logits=logits),
        call=lambda model, batch: model(*batch),
        example_index=lambda batch: batch.star,
        edges=_nodes,
        names=_names,
        perturb=_perturb,
    )


def _nodes(batch: Graphs) -> dict[str, Tensor]:
    """The nodes of edges, numbered within their star; the centre is the last."""
    first = torch.cat([batch.centre.new_zeros(1), batch.centre[:-1] + 1])[batch.star]
    return {"source": batch.edges[0] - first, "target": batch.edges[1] - first, "relation": batch.colour}


def _perturb(batch: Graphs, generator: Generator) -> Graphs:
    """Other colours, the same nodes: a centre's own state is not masked, so it may change the output."""
    other = torch.randint(0, COLOURS, batch.colour.shape, generator=generator)
    return batch._replace(colour=other.to(batch.colour.device))


def _names(batch: Graphs) -> list[list[str]]:
    names: list[list[str]] = [[] for _ in batch.centre]
    for star, colour in zip(batch.star.tolist(), batch.colour.tolist(), strict=True):
        names[star].append(f"colour {colour}")
    return names
