"""The base class of explainers that read attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskhooks.errors import ModelError, SettingError
from maskhooks.explainers.base import Explainer
from maskhooks.model.hooked import Hooked
from maskhooks.passes.attention import attention_weights
from maskhooks.passes.clean import Clean
from maskhooks.settings.types import Seed
from maskhooks.sites.places import Places
from maskhooks.sites.site import Selector, Site

Queries = Literal["mean", "cls", "last"] | int
_NUMBERS = {"cls": 0, "last": -1}
_ROUNDED = 1e-2  # by how much weights in half precision may exceed 1


class Attending(Explainer):
    """An explainer that reads attention weights, in one more pass of the model; nothing is learned.

    Args:
        hooked: the wrapped model.
        sites: the inputs of the layers that have attention weights, in order. All hidden states will do: a state after
            the last layer, and one before the first layer's input, are left out.
        queries: whose attention counts: the mean over all positions, "cls" or "last", the first or the last valid
            position of each example, or the number of another, where -1 is the last. A prediction is mostly read from
            "cls" in BERT and ViT, and from "last" in GPT.
        layer: the number of the layer, from 0, where -1 is the last; None gives every layer its own scores.
        seed: the random seed, for the order in which a shuffling loader gives batches to `explain_to`.

    Raises:
        UnknownSiteError: no site matches.

    While it explains:
        ModelError: the model has no attention weights, or they are not of these positions.
        SettingError: there is no such layer or query position, or sites and layers do not correspond.
    """

    def __init__(
        self,
        hooked: Hooked,
        sites: Selector = "hidden",
        *,
        queries: Queries = "mean",
        layer: int | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(hooked, seed=seed)
        self.sites = hooked.required_sites(sites)
        self.queries, self.layer = queries, layer

    @property
    def reads(self) -> Sequence[Site]:
        return self.sites

    def weights(self, clean: Clean) -> list[tuple[Site, Float[Tensor, "batch head query key"]]]:
        """Return the input and the attention weights of each layer; rows of padding that are not finite are 0."""
        found = attention_weights(clean)
        pairs = zip(self._inputs(len(found)), found, strict=True)
        return [(site, _fitting(clean.places[site], site, weights)) for site, weights in pairs]

    def chosen(self, layers: int) -> range:
        """Return the numbers of the layers that have scores.

        Raises:
            SettingError: there is no such layer.
        """
        if self.layer is None:
            return range(layers)
        if not -layers <= self.layer < layers:
            raise SettingError(
                f"layer={self.layer}: there are attention weights of {layers} layers. Give a number from 0 to "
                f"{layers - 1}, or from -{layers} to -1, counted from the end"
            )
        return range(layers)[self.layer : self.layer % layers + 1]

    def read(self, table: Float[Tensor, "batch query key"], places: Places) -> Float[Tensor, "batch key"]:
        """Return what the chosen queries give each key; 0 for padding.

        Args:
            table: what each query gives each key.
            places: the positions of the keys.
        """
        return torch.einsum("bq,bqk->bk", self._queried(places.valid), table) * places.valid

    def summed(self, numbers: Float[Tensor, "batch *rest key"], places: Places) -> Float[Tensor, "batch *rest key"]:
        """Return for every key the sum over those that are gated with it."""
        if places.units is None:
            return numbers
        first = places.units.first
        return torch.einsum("b...k,bkj->b...j", numbers, (first[:, :, None] == first[:, None, :]).to(numbers))

    def _queried(self, valid: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch query"]:
        """Return the share of each query in the scores.

        Raises:
            SettingError: an example has no such position.
        """
        count = valid.sum(1, keepdim=True)
        if self.queries == "mean":
            return valid / count.clamp(min=1)
        number = _NUMBERS.get(self.queries, self.queries) if isinstance(self.queries, str) else self.queries
        assert isinstance(number, int)
        missing = ((number >= count) | (number < -count))[:, 0].nonzero()
        if len(missing):
            example = int(missing[0])
            raise SettingError(
                f"queries={self.queries!r}: example {example} of the batch has {int(count[example])} valid positions, "
                "so there is no such query. Give 'mean', 'cls', 'last', or a number that every example has"
            )
        rank = valid.long().cumsum(1) - 1  # of valid positions within their example
        return (valid & (rank == number % count)).float()

    def _inputs(self, layers: int) -> list[Site]:
        """Return the site of each layer's input."""
        if len(self.sites) == layers:
            return self.sites
        if len(self.sites) in (layers + 1, layers + 2):
            return self.sites[-layers - 1 : -1]
        raise SettingError(
            f"{type(self).__name__} has {len(self.sites)} sites, from {self.sites[0]} to {self.sites[-1]}, and "
            f"attention weights of {layers} layers. Give the input of each of these layers: sites=[...], {layers} sites"
        )


def _fitting(
    places: Places, site: Site, weights: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    """Return the weights, checked.

    Raises:
        ModelError: they are not weights between the positions of the site.
    """
    valid = places.valid
    batch, _, queries, keys = weights.shape
    if places.example_index is not None or valid.shape != (batch, keys) or queries != keys:
        raise ModelError(
            f"attention weights of shape {list(weights.shape)} are not from each position of {site} to each other: it "
            f"has positions ({', '.join(site.gating().positions)}) of shape {list(valid.shape)}. Local attention and "
            "pooling give such weights. Use LeaveOneOut, Erasure or DiffMask"
        )
    weights = weights.to(valid.device)
    weights = torch.where(~valid[:, None, :, None] & ~weights.isfinite(), 0, weights)
    if not bool(((weights >= 0) & (weights.sum(-1, keepdim=True) <= 1 + _ROUNDED)).all()):
        raise ModelError(
            f"the values read as attention weights at {site} are not: weights are from 0 to 1, and those of a query "
            f"sum to at most 1, but these go from {float(weights.min()):.2g} to {float(weights.max()):.2g} and sum to "
            f"up to {float(weights.sum(-1).max()):.2g}. Give weights after the softmax: wrap(model, attention=...). "
            "Linear attention has none"
        )
    return weights.clamp(max=1)
