"""The digits task of De Cao et al. 2020, section 3.1: does one digit occur more often than another?

An example has a query of two distinct digits and a sequence of one to ten digits. The label is 1 if the first query
digit occurs more often than the second. A prediction needs only the tokens that equal a query digit, so the true
attribution is known: equal weight on these tokens, zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.distributions import Bernoulli
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from maskhooks.explanations.explanation import Explanation
from maskhooks.metrics import attribution as metrics
from maskhooks.model.hooked import Hooked
from maskhooks.model.wrapping import wrap
from maskhooks.sites.site import Site

LENGTH = 10
INPUT, HIDDEN = "embedding:output", "bottleneck:output"


@dataclass(frozen=True)
class Setting:
    """DiffMask's settings for this model.

    Args:
        sites: what is masked.
        conditioned_on: the site that the masks read; None for the masked site itself.
        margin: the mean divergence allowed, in nats.
        steps: training steps.
    """

    sites: str
    conditioned_on: str | None
    margin: float
    steps: int = 700


SETTINGS = {
    "hidden state": Setting(HIDDEN, None, 0.05),
    "input, given the hidden state": Setting(INPUT, HIDDEN, 0.12),
}


@dataclass(frozen=True)
class Digits:
    """Examples of the task, one per row.

    `query` holds two distinct digits, `digits` the sequence padded with 0; `valid` is False at padding.
    """

    query: Int[Tensor, "batch 2"]
    digits: Int[Tensor, "batch token"]
    valid: Bool[Tensor, "batch token"]

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, rows: slice | Tensor) -> Digits:
        return Digits(self.query[rows], self.digits[rows], self.valid[rows])

    @property
    def label(self) -> Float[Tensor, " batch"]:
        """1 where the first digit asked for occurs more often than the second, else 0."""
        first, second = (self._equals(which).sum(1) for which in (0, 1))
        return (first > second).float()

    def truth(self) -> Float[Tensor, "batch token"]:
        """Return the true attribution, which sums to 1; all zero if no query digit occurs."""
        needed = (self._equals(0) | self._equals(1)).float()
        return needed / needed.sum(1, keepdim=True).clamp(min=1)

    def erasure(self) -> Float[Tensor, "batch token"]:
        """Return the constructed erasure of the paper's table 1: all weight on the first digit that decides the label.

        The smallest set that keeps the prediction has only one token, which says little about what the model uses.
        """
        deciding = torch.where(self.label.bool()[:, None], self._equals(0), self._equals(1))
        first = deciding & (deciding.cumsum(1) == 1)
        return first.float()

    def loader(self, batch_size: int = 128, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        """Return batches of (query, digits, valid)."""
        data = TensorDataset(self.query, self.digits, self.valid)
        return DataLoader(data, batch_size=batch_size, shuffle=shuffle)

    def _equals(self, which: int) -> Bool[Tensor, "batch token"]:
        return (self.digits == self.query[:, which, None]) & self.valid


def generate(count: int = 10_000, seed: int = 0) -> tuple[Digits, Digits]:
    """Generate training and validation examples (nine to one).

    A digit of the sequence is each query digit with probability .25, and each other digit with .0625; lengths are
    uniform from 1 to 10.
    """
    generator = torch.Generator().manual_seed(seed)
    query = torch.rand(count, 10, generator=generator).argsort(1)[:, :2]
    weights = torch.full((count, 10), 0.5 / 8).scatter(1, query, 0.25)
    digits = torch.multinomial(weights, LENGTH, replacement=True, generator=generator)
    length = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    valid = torch.arange(LENGTH) < length
    data = Digits(query, torch.where(valid, digits, 0), valid)
    cut = count * 9 // 10
    return data[:cut], data[cut:]


class DigitsModel(nn.Module):
    """The paper's toy model: two embeddings, a two-dimensional bottleneck per token, and a GRU over it."""

    def __init__(self) -> None:
        super().__init__()
        self.query_embedding = nn.Embedding(10, 64)
        self.embedding = nn.Embedding(10, 64)
        self.feedforward = nn.Linear(192, 64)
        self.bottleneck = nn.Linear(64, 2)
        self.gru = nn.GRU(2, 64, batch_first=True)
        self.classifier = nn.Linear(64, 1)

    def forward(
        self,
        query: Int[Tensor, "batch 2"],
        digits: Int[Tensor, "batch token"],
        valid: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, " batch"]:
        """Return the logits of the label."""
        asked = self.query_embedding(query).flatten(1)[:, None].expand(-1, digits.shape[1], -1)
        states = self.bottleneck(torch.tanh(self.feedforward(torch.cat([asked, self.embedding(digits)], -1))))
        packed = pack_padded_sequence(states, valid.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        logits: Tensor = self.classifier(self.gru(packed)[1][0]).squeeze(-1)
        return logits


def train_model(
    train: Digits, *, seed: int = 0, epochs: int = 20, learning_rate: float = 3e-3
) -> Iterator[tuple[int, DigitsModel]]:
    """Train the model, yielding (epoch, model) after each epoch; the last model is final.

    Adam, batches of 128, linear decay over the second half. The loss is the cross-entropy minus 0.35 times the mean
    entropy of the predictions, which keeps logits moderate (the authors' term is an entropy over the batch axis).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 2 * (1 - epoch / epochs)))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(train), generator=generator).split(128):
            batch = train[rows]
            logits = model(batch.query, batch.digits, batch.valid)
            entropy = Bernoulli(logits=logits).entropy().mean()
            loss = F.binary_cross_entropy_with_logits(logits, batch.label) - 0.35 * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        yield epoch, model.eval()


@torch.no_grad()
def accuracy(model: DigitsModel, data: Digits) -> float:
    """Return the fraction of correct predictions."""
    logits = model(data.query, data.digits, data.valid)
    return float(((logits > 0) == data.label.bool()).float().mean())


def attribution(explanation: Explanation, data: Digits) -> Float[Tensor, "example token"]:
    """Return the scores of all examples at one depth, normalised over valid tokens."""
    scores = torch.from_numpy(explanation["score"]).view(data.digits.shape)
    return metrics.normalize(scores, data.valid)


def distances(found: Float[Tensor, "example token"], data: Digits) -> dict[str, float]:
    """Return the distance of attributions from the truth.

    KL and JS, in nats, are means over examples with a query digit; the entropy ratio is a mean over examples with two
    or more tokens.
    """
    truth = data.truth()
    asked = truth.sum(1) > 0
    return {
        "kl": metrics.kl(truth[asked], found[asked]).mean().item(),
        "js": metrics.js(truth[asked], found[asked]).mean().item(),
        "entropy_ratio": metrics.entropy_ratio(found, data.valid).nanmean().item(),
    }


def hook(model: nn.Module) -> Hooked:
    """Wrap the model without any plugin: two sites, one mask of valid positions, one output function."""
    pattern = "batch token hidden -> batch token"
    return wrap(
        model,
        sites=[
            Site.parse(INPUT, pattern, tags=frozenset({"input", "hidden"})),
            Site.parse(HIDDEN, pattern, tags=frozenset({"hidden"})),
        ],
        output=lambda logits: Bernoulli(logits=logits),
        valid=lambda batch: batch[2],
        names=_names,
        perturb=_perturb,
    )


def _names(batch: Sequence[Tensor]) -> list[list[str]]:
    return [[str(digit) for digit in row] for row in batch[1].tolist()]


def _perturb(batch: Sequence[Tensor], generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Other digits, the same query: the query is not masked, so it may change the output."""
    query, digits, valid = batch
    other = torch.randint(0, 10, digits.shape, generator=generator).to(digits.device)
    return query, torch.where(valid, other, digits), valid
