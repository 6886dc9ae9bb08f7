"""Small models for the tests of the adapter of Captum, and what their sites hold."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from maskhooks_captum.plugin import maskhooks_explainers
from torch import Tensor, nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.explainers.base import Explainer
from maskhooks.model.hooked import Hooked

STATE = "bert.encoder.layer.1:output"
HEADS = "bert.encoder.layer.1.attention.output.dense:input"
TOKENS = "batch token hidden -> batch token"


def bert(**settings: Any) -> Any:
    """A random BERT of three layers and three classes, in eval mode."""
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **settings}
    config = transformers.BertConfig(intermediate_size=32, num_labels=3, attn_implementation="eager", **config)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # so that outputs move
    return model


def padded() -> dict[str, Tensor]:
    """Three texts of 7, 5 and 6 tokens."""
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5], [6]])).long()}


class Mixed(nn.Module):
    """Tokens as vectors, a layer for each and one for all; each non-linear part is a module, used once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(5, 6), nn.Tanh()
        self.second, self.relu = nn.Linear(6, 6), nn.ReLU()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x)).sum(1)
        found: Tensor = self.last(self.relu(self.second(hidden)))
        return found


def mixed(model: nn.Module | None = None, **options: Any) -> Hooked:
    """The small model, or another, with the output of its first layer as a site."""
    torch.manual_seed(0)
    settings = {"sites": {"first:output": TOKENS}, "output": lambda logits: Categorical(logits=logits)}
    return maskhooks.wrap(model or Mixed(), **{**settings, **options})


def vectors(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, 5, generator=torch.Generator().manual_seed(2))


def made(name: str, hooked: Hooked, sites: Any, **settings: Any) -> Explainer:
    """A method of Captum by its name, with few samples."""
    few = {"shapley-sampling": {"n_samples": 3}, "kernel-shap": {"n_samples": 20}, "lime": {"n_samples": 20}}
    return maskhooks_explainers()[name](hooked, sites=sites, **{**few.get(name, {}), **settings})


def explained(hooked: Hooked, name: str, batch: Any, sites: Any, **settings: Any) -> Tensor:
    """The scores at one site, axes as they are gated."""
    rows = made(name, hooked, sites, **settings).explain(batch)["score"]
    value, (site,) = value_at(hooked, batch, sites), hooked.required_sites(sites)
    return torch.as_tensor(rows).reshape(site.gating().mask_shape(value))


def value_at(hooked: Hooked, batch: Any, site: str) -> Tensor:
    with torch.no_grad(), hooked.tap(read=site) as tap:
        hooked(batch)
    return tap.values[site]
