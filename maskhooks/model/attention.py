"""Attention weights: what a pass of a model that computes them gives, and those at places that a user names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from maskhooks.errors import ModelError
from maskhooks.hooks.tap import Tap
from maskhooks.sites.site import Site

#: Where attention weights are: addresses of values, one for each layer, or a function of the model and a batch.
Where = Callable[[nn.Module, Any], Iterable[Tensor]] | Sequence[str | Site]


class Attended(NamedTuple):
    """A pass that gave attention weights.

    Args:
        weights: for each layer that has some, axes batch, head, query and key; rows over keys sum to at most 1. Without
            a head axis they are means over heads.
        result: what the model returned; None if that is not known.
    """

    weights: Sequence[Tensor]
    result: Any = None


def attended(model: nn.Module, batch: Any, where: Where | None, call: Callable[[nn.Module, Any], Any]) -> Attended:
    """Return the attention weights at the places that a user names.

    Args:
        where: the user's places; None if there are none.
        call: runs the model on a batch.

    Raises:
        ModelError: it is not known where this model has attention weights.
        UnknownSiteError, SiteNeverFiredError, NotATensorError: there is no tensor at an address.
    """
    if where is None:
        raise ModelError(
            f"it is not known where {type(model).__name__} has attention weights, if it has any. Say where: "
            "wrap(model, attention=['encoder.attention:output[1]']), an address for each layer, or "
            "wrap(model, attention=lambda model, batch: ...), a tensor (batch, head, query, key) for each layer. "
            "LeaveOneOut, Erasure and DiffMask need no attention"
        )
    if callable(where):
        return Attended(list(where(model, batch)))
    sites = [Site.parse(place) if isinstance(place, str) else place for place in where]
    with Tap(model, sites) as tap:
        result = call(model, batch)
    return Attended([tap.values[site] for site in sites], result)
