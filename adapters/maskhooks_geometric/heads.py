"""Predictions for nodes, links or graphs as distributions; each graph is one example."""

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
    """The distribution that a model's outputs describe, or the outputs themselves if it is unknown.

    A row of several numbers holds the logits or log-probabilities of classes; if the labels (`y`) are 0 or 1 for each
    class, one binary logit per class. A single number is a binary logit if the batch's labels are binary.

    Args:
        level: one of `LEVELS`; None infers it from the number of rows.
        chosen: the nodes or links that count; None means those that the batch names, or all.
    """
    if isinstance(result, Mapping) and all(isinstance(part, Tensor) for part in result.values()):
        if graphs.seeds is not None and graphs.seeds[0] in result:
            return _of(result[graphs.seeds[0]], graphs, "node", chosen, graphs.seeds[0])
        return {kind: _of(part, graphs, "node", chosen, str(kind)) for kind, part in result.items()}
    result = result[0] if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor) else result
    return _of(result, graphs, level, chosen, None) if isinstance(result, Tensor) else result


def level_of(result: Any, graphs: Graphs, level: str | None) -> str:
    """`level`, or what a model's outputs are about if it is None."""
    result = result[0] if isinstance(result, (tuple, list)) else result
    return level or (_level(result, graphs, None) if isinstance(result, Tensor) else "node")


def _of(result: Tensor, graphs: Graphs, level: str | None, chosen: Tensor | None, kind: str | None) -> Outputs:
    level = level or _level(result, graphs, kind)
    if level == "graph":
        _check_rows(result, "graph", graphs.count)
        return _classes(result, graphs)
    if level == "node" and kind is None:
        kind = _kind(result, graphs)
    graph_index = graphs.graph_of_links() if level == "link" else graphs.graph_of(kind)
    graph_index = torch.zeros(len(result), dtype=torch.long) if graph_index is None else graph_index
    index = chosen if chosen is not None else named(graphs, level, kind)
    if level == "node" and len(result) < graphs.nodes(kind) and _seeds(graphs, kind) == len(result):
        graph_index, index = graph_index[: len(result)], chosen  # the model predicts for the seeds alone
    _check_rows(result, level, len(graph_index))
    graph_index = graph_index.to(result.device)
    if index is not None:
        _check_index(index, level, len(result))
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.reshape(-1)
        result, graph_index = result[index.to(result.device)], graph_index[index.to(graph_index.device)]
    return _by_graph(_classes(result, graphs), graph_index, graphs.count)


def _check_rows(result: Tensor, level: str, count: int) -> None:
    """Check that there are as many predictions as nodes, links or graphs.

    Raises:
        BatchError: the numbers differ.
    """
    rows = len(result) if result.dim() else 1
    if rows != count:
        raise BatchError(
            f"there are {rows} predictions for {count} {level}s. Say what they are about, "
            "wrap(model, level='node'), or what they mean, wrap(model, output=...)"
        )


def _check_index(index: Tensor, level: str, count: int) -> None:
    """Check the indices of predictions.

    Raises:
        BatchError: an index is out of range, or not an integer.
    """
    whole = not index.is_floating_point() and not index.is_complex()
    if index.dtype == torch.bool:
        fits, got = index.numel() == count, f"{index.numel()} bools"
    else:
        fits = whole and (not index.numel() or (int(index.min()) >= 0 and int(index.max()) < count))
        got = f"{index.reshape(-1).tolist()[:5]}"
    if not fits:
        raise BatchError(
            f"{level}_index, or index=, got {got} for {count} predictions. Say which {level}s count, by indices from 0 "
            "or a bool for each"
        )


def _level(result: Tensor, graphs: Graphs, kind: str | None) -> str:
    """What predictions are about, by their number.

    Raises:
        BatchError: the number matches nothing in the batch.
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
        "the rows are about, wrap(model, level='node'), or what they mean, wrap(model, output=...)"
    )


def _classes(result: Tensor, graphs: Graphs) -> Distribution:
    if result.dim() == 2 and result.shape[1] > 1:
        if _several(graphs.get("y"), result.shape[1]):
            return Bernoulli(logits=result, validate_args=True)
        return Categorical(logits=result, validate_args=True)  # torch.compile turns validation off globally
    labels = next((found for name in ("edge_label", "y") if (found := graphs.for_links(name)) is not None), None)
    if labels is None or bool(((labels != 0) & (labels != 1)).any()) or result.dim() > 2:
        raise UnknownDistributionError(
            f"the model predicts numbers of shape {list(result.shape)}, and the batch has no binary labels to say that "
            "these are logits. Say what they mean: wrap(model, output=lambda outputs: "
            "torch.distributions.Bernoulli(logits=outputs))"
        )
    return Bernoulli(logits=result.reshape(-1), validate_args=True)


def _several(labels: Any, width: int) -> bool:
    """Whether labels are 0 or 1 for each of several classes, or NaN if unknown.

    Raises:
        UnknownDistributionError: they are neither that nor class probabilities, as in regression.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] != width:
        return False
    if bool(((labels == 0) | (labels == 1) | labels.isnan()).all()):
        return True
    if bool((labels >= 0).all()) and torch.allclose(labels.sum(1).float(), torch.ones_like(labels[:, 0]).float()):
        return False
    raise UnknownDistributionError(
        f"each label of the batch is {width} numbers, as in regression, so the outputs may not be logits. "
        "Say what they mean: wrap(model, output=lambda outputs: torch.distributions.Normal(outputs, 1.0))"
    )


def named(graphs: Graphs, level: str, kind: str | None = None) -> Tensor | None:
    """The nodes or links whose predictions count, if the batch names them itself or is a sampled subgraph."""
    held = graphs.get(f"{level}_index")
    if isinstance(held, (Tensor, int, list)):
        return torch.as_tensor(held).reshape(-1)
    if level != "node":
        return None
    seeds = _seeds(graphs, kind)
    return None if seeds is None else torch.arange(seeds)


def _seeds(graphs: Graphs, kind: str | None) -> int | None:
    """How many seed nodes of a type a loader sampled from."""
    return graphs.seeds[1] if graphs.seeds is not None and graphs.seeds[0] == kind else None


def _kind(result: Tensor, graphs: Graphs) -> str | None:
    """The type of the nodes that predictions are about; for a sampled batch, the type of the seeds."""
    if graphs.seeds is not None and len(result) in (graphs.seeds[1], graphs.nodes(graphs.seeds[0])):
        return graphs.seeds[0]
    return next((name for name in graphs.node_types if graphs.nodes(name) == len(result)), None)


def _by_graph(found: Distribution, graph_index: Tensor, count: int) -> Outputs:
    """A distribution for each graph: its only prediction, or all its predictions as positions."""
    numbers = torch.bincount(graph_index, minlength=count)
    if bool((numbers == 1).all()):
        order = graph_index.argsort()
        return type(found)(logits=found.logits[order])  # type: ignore[attr-defined, call-arg]
    most = int(numbers.max())
    place = ExampleIndex(graph_index, count).places()
    logits = found.logits  # type: ignore[attr-defined]
    dense = logits.new_zeros(count, most, *logits.shape[1:])
    dense = dense.index_put((graph_index, place), logits)
    chosen = torch.zeros(count, most, dtype=torch.bool, device=logits.device)
    chosen[graph_index, place] = True
    return Positions(type(found)(logits=dense), chosen)  # type: ignore[call-arg]
