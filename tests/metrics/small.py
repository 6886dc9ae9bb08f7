"""A tiny text classifier with padding and special tokens, and explanations of it with given scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks import Explanation, Hooked
from maskhooks.explanations.explanation import Scores
from maskhooks.model.fingerprint import fingerprint

SITE = "embedding:output"
LENGTHS = (6, 3, 4, 8)
WORDS = ["[PAD]", "[CLS]", "[MASK]", *(f"word{index}" for index in range(3, 20))]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 5)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = (self.embedding(ids) * mask[..., None]).cumsum(1)
        return self.last((torch.tanh(self.first(hidden)) * mask[..., None]).sum(1))


def model(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier().eval()


def hooked(network: Classifier | None = None, **options: Any) -> Hooked:
    return maskhooks.wrap(
        network or model(),
        sites={SITE: "batch token hidden -> batch token", "first:output": "batch token hidden -> batch token"},
        output=lambda logits: Categorical(logits=logits),
        valid=lambda batch: batch[1].bool(),
        names=lambda batch: [[WORDS[index] for index in row] for row in batch[0].tolist()],
        **options,
    )


def batch(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids, each text beginning with [CLS], and their mask."""
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 20, mask.shape, generator=draw)
    ids[:, 0] = 1
    return ids * mask, mask


def scores(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    return [draw.normal(size=length).astype(np.float32) for length in lengths]


def explanation(
    wrapped: Hooked, inputs: tuple[Tensor, Tensor], rows: Sequence[Any], start_index: int = 0, site: str = SITE
) -> Explanation:
    """An explanation of a batch with these scores of each example."""
    ids, mask = inputs
    values = torch.zeros(mask.shape)
    for line, row in zip(values, rows, strict=True):
        line[: len(row)] = torch.as_tensor(np.asarray(row))
    (found,) = wrapped.find(site)
    names = [[WORDS[index] for index in row] for row in ids.tolist()]
    provenance = {"fingerprint": fingerprint(wrapped.model)["digest"]}
    part = Scores(found, 0, values, mask.bool(), names)
    return Explanation.build([part], provenance=provenance, start_index=start_index)


def probabilities(network: Classifier, ids: Tensor, removed: Sequence[int], baseline: Tensor | None = None) -> Tensor:
    """The classes' probabilities for one text without padding, with some embeddings replaced: by hand, in float64."""
    double = {name: tensor.detach().double() for name, tensor in network.state_dict().items()}
    total, found = torch.zeros(5, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for position, index in enumerate(ids.tolist()):
        value = double["embedding.weight"][index]
        if position in removed:
            value = torch.zeros(5, dtype=torch.float64) if baseline is None else baseline.double()
        total = total + value
        found = found + torch.tanh(double["first.weight"] @ total + double["first.bias"])
    logits: Tensor = double["last.weight"] @ found + double["last.bias"]
    return logits.softmax(0)
