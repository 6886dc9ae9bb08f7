"""Heads: predictions for nodes, links or graphs as distributions, an example a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from maskhooks.errors import BatchError, UnknownDistributionError
from maskhooks.model.outputs import Outputs, Positions
from maskhooks.sites.example_index import ExampleIndex
from maskhooks_geometric.graphs import Graphs

LEVELS = ("node", "link", "graph")


def distribution(result: Any, graphs: Graphs, level: str | None, chosen: Tensor | None) -> Any:
    """What a model's outputs say, or the outputs themselves where nothing tells.

    A row of several numbers holds the logits of classes, or their log-probabilities; where labels (`y`) say yes or no
    for each class, of each by itself. A single number is the logit of a binary class where the batch's labels are such.

    Args:
        level: one of `LEVELS`; None tells by the number of rows.
        chosen: which nodes or links count; None is those that the batch names, or all.
    """
    if isinstance(result, Mapping) and all(isinstance(part, Tensor) for part in result.values()):
        if graphs.seeds is not None and graphs.seeds[0] in result:
            return _of(result[graphs.seeds[0]], graphs, "node", chosen, graphs.seeds[0])
        return {kind: _of(part, graphs, "node", chosen, str(kind)) for kind, part in result.items()}
    result = result[0] if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor) else result
    return _of(result, graphs, level, chosen, None) if isinstance(result, Tensor) else result


def level_of(result: Any, graphs: Graphs, level: str | None) -> str:
    """What a model's outputs are about, where `level` does not say so."""
    result = result[0] if isinstance(result, (tuple, list)) else result
    return level or (_level(result, graphs, None) if isinstance(result, Tensor) else "node")


def _of(result: Tensor, graphs: Graphs, level: str | None, chosen: Tensor | None, kind: str | None) -> Outputs:
    level = level or _level(result, graphs, kind)
    if level == "graph":
        _check_rows(result, "graph", graphs.count)
        return _classes(result, graphs)
    if level == "node" and kind is None:
        kind = _kind(result, graphs)
    whose = graphs.graph_of_links() if level == "link" else graphs.graph_of(kind)
    whose = torch.zeros(len(result), dtype=torch.long) if whose is None else whose
    index = chosen if chosen is not None else named(graphs, level, kind)
    if level == "node" and len(result) < graphs.nodes(kind) and _seeds(graphs, kind) == len(result):
        whose, index = whose[: len(result)], chosen  # the model has left the others out
    _check_rows(result, level, len(whose))
    whose = whose.to(result.device)
    if index is not None:
        _check_index(index, level, len(result))
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.reshape(-1)
        result, whose = result[index.to(result.device)], whose[index.to(whose.device)]
    return _by_graph(_classes(result, graphs), whose, graphs.count)


def _check_rows(result: Tensor, level: str, count: int) -> None:
    """Refuses another number of predictions than of what they are about.

    Raises:
        BatchError: there is another number.
    """
    rows = len(result) if result.dim() else 1
    if rows != count:
        raise BatchError(
            f"predictions are about each {level}, and there are {rows} of them for {count} {level}s. Say what they are "
            "about, wrap(model, level='node'), or what they mean, wrap(model, output=...)"
        )


def _check_index(index: Tensor, level: str, count: int) -> None:
    """Refuses numbers of predictions that are not there.

    Raises:
        BatchError: there are some.
    """
    whole = not index.is_floating_point() and not index.is_complex()
    if index.dtype == torch.bool:
        fits, got = index.numel() == count, f"{index.numel()} truth values"
    else:
        fits = whole and (not index.numel() or (int(index.min()) >= 0 and int(index.max()) < count))
        got = f"{index.reshape(-1).tolist()[:5]}"
    if not fits:
        raise BatchError(
            f"{level}_index, or index=, says which {level}s count, by numbers from 0 or a truth value for each: got "
            f"{got} for {count} predictions"
        )


def _level(result: Tensor, graphs: Graphs, kind: str | None) -> str:
    """What predictions are about, by their number.

    Raises:
        BatchError: they are as many as nothing in the batch.
    """
    kinds: list[str | None] = [*graphs.node_types] or [kind]
    nodes = [graphs.nodes(name) for name in kinds]
    rows = len(result) if result.dim() else 1
    if graphs.pairs is not None and rows == graphs.pairs.shape[1]:
        return "link"
    if rows == graphs.count and rows not in nodes and graphs.seeds is None:
        return "graph"
    if rows in nodes or (graphs.seeds is not None and rows == graphs.seeds[1]):
        return "node"
    raise BatchError(
        f"the model predicts {rows} rows, and the batch holds {graphs.count} graphs of {sum(nodes)} nodes. Say what "
        "they are about, wrap(model, level='node'), or what they mean, wrap(model, output=...)"
    )


def _classes(result: Tensor, graphs: Graphs) -> Distribution:
    if result.dim() == 2 and result.shape[1] > 1:
        if _several(graphs.get("y"), result.shape[1]):
            return Bernoulli(logits=result, validate_args=True)
        return Categorical(logits=result, validate_args=True)  # which torch.compile turns off everywhere
    labels = next((found for name in ("edge_label", "y") if (found := graphs.for_links(name)) is not None), None)
    if labels is None or bool(((labels != 0) & (labels != 1)).any()) or result.dim() > 2:
        raise UnknownDistributionError(
            f"the model predicts numbers of shape {list(result.shape)}, and the batch's labels do not say that these "
            "are logits of a binary class. Say what they mean: wrap(model, output=lambda outputs: "
            "torch.distributions.Bernoulli(logits=outputs))"
        )
    return Bernoulli(logits=result.reshape(-1), validate_args=True)


def _several(labels: Any, width: int) -> bool:
    """Whether labels are yes or no for each of several classes, NaN where nothing is known.

    Raises:
        UnknownDistributionError: they are other numbers, as in regression, and no probabilities of classes.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] != width:
        return False
    if bool(((labels == 0) | (labels == 1) | labels.isnan()).all()):
        return True
    if bool((labels >= 0).all()) and torch.allclose(labels.sum(1).float(), torch.ones_like(labels[:, 0]).float()):
        return False
    raise UnknownDistributionError(
        f"the batch's labels are {width} numbers each, as of a regression, and so no logits are known to be predicted. "
        "Say what outputs mean: wrap(model, output=lambda outputs: torch.distributions.Normal(outputs, 1.0))"
    )


def named(graphs: Graphs, level: str, kind: str | None = None) -> Tensor | None:
    """The nodes whose predictions count, where the batch names them: by itself, or as a sampled subgraph."""
    held = graphs.get(f"{level}_index")
    if isinstance(held, (Tensor, int, list)):
        return torch.as_tensor(held).reshape(-1)
    if level != "node":
        return None
    seeds = _seeds(graphs, kind)
    return None if seeds is None else torch.arange(seeds)


def _seeds(graphs: Graphs, kind: str | None) -> int | None:
    """How many nodes of a type a loader began to sample with."""
    return graphs.seeds[1] if graphs.seeds is not None and graphs.seeds[0] == kind else None


def _kind(result: Tensor, graphs: Graphs) -> str | None:
    """The type of the nodes that predictions are about: of those sampled, that which the loader began with."""
    if graphs.seeds is not None and len(result) in (graphs.seeds[1], graphs.nodes(graphs.seeds[0])):
        return graphs.seeds[0]
    return next((name for name in graphs.node_types if graphs.nodes(name) == len(result)), None)


def _by_graph(found: Distribution, whose: Tensor, count: int) -> Outputs:
    """A distribution for each graph: its only prediction, or all of them as positions."""
    numbers = torch.bincount(whose, minlength=count)
    if bool((numbers == 1).all()):
        order = whose.argsort()
        return type(found)(logits=found.logits[order])  # type: ignore[attr-defined, call-arg]
    most = int(numbers.max())
    place = ExampleIndex(whose, count).places()
    logits = found.logits  # type: ignore[attr-defined]
    dense = logits.new_zeros(count, most, *logits.shape[1:])
    dense = dense.index_put((whose, place), logits)
    chosen = torch.zeros(count, most, dtype=torch.bool, device=logits.device)
    chosen[whose, place] = True
    return Positions(type(found)(logits=dense), chosen)  # type: ignore[call-arg]
