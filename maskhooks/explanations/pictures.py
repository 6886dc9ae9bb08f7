"""Pictures: draw one example's scores as a figure or as an example on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maskhooks.errors import SettingError
from maskhooks.explanations.layers import ALL, Layers, Scored
from maskhooks.explanations.score_labels import scale_end
from maskhooks.explanations.scores import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from maskhooks.viz.graph import GraphLayout
    from maskhooks.viz.page import Example
    from maskhooks.viz.totals import Totals


Node = int | tuple[int, int]
Names = Sequence[str] | Mapping[Node, str] | Mapping[int, str]
_LARGE, _DRAWN = 3000, 1000  # above _LARGE edges draw only _DRAWN: layout takes minutes and the picture blurs
_KINDS = ("auto", "heatmap", "bars", "image", "graph", "profile")


def picture(
    layers: Layers, kind: str, *, title: str, label: str, nodes: Names, target_node: Node | None, ax: Axes | None
) -> Figure:
    """Draw one example's layers; see `Explanation.plot`."""
    if kind not in _KINDS:
        raise SettingError(f"there is no kind of picture {kind!r}. The kinds are {', '.join(_KINDS)}")
    patches = bool(layers.width())
    if kind == "auto":
        single = "bars" if len(layers) == 1 else "heatmap"
        kind = "image" if patches else "graph" if layers.connected else single
    depths = [row if row == ALL else f"depth {row}" for row in layers.labels]
    if kind == "graph":
        return _graph(layers, depths, title=title, label=label, nodes=nodes, target_node=target_node, ax=ax)
    top = scale_end(label, layers.columns["score"])
    totals = _totals(layers, label, ax) if kind == "profile" else None
    if kind == "image" or (kind == "profile" and patches):
        if not patches:
            raise SettingError(
                "an image needs patches, from a pattern such as 'batch channel height width -> batch height "
                "width'; these positions are not patches. Plot them as 'heatmap' or 'bars'"
            )
        from maskhooks.viz.image import images

        return images(layers.images(), depths, title=title, label=label, top=top, totals=totals, ax=ax)
    scores, labels = layers.grid()
    if kind == "bars":
        from maskhooks.viz.bars import bars

        return bars(scores, depths, labels, title=title, label=label, top=top, ax=ax)
    from maskhooks.viz.heatmap import heatmap

    return heatmap(scores, layers.labels, labels, title=title, label=label, top=top, totals=totals, ax=ax)


def _totals(layers: Layers, label: str, ax: Axes | None) -> Totals:
    """What the layers of an example have in all.

    Raises:
        SettingError: layers cannot be compared by their sums, there is one only, or there is one Axes for all.
    """
    from maskhooks.explanations.profile import check_profile
    from maskhooks.viz.totals import Totals

    unit = check_profile(layers.pairs, label)
    if len(layers) < 2:
        raise SettingError("a profile compares layers, and this explanation has one only. Explain several sites")
    if ax is not None:
        raise SettingError("a profile has several Axes. Leave out ax, or plot a 'heatmap'")
    sums = layers.totals()
    return Totals(sums, -np.diff(sums), unit)


def page_note(layers: Layers, sites: Sequence[str]) -> str:
    """One or two sentences on what a page shows."""
    masked = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    axes = " and ".join(f"{name}s" for name in layers.other_axes)
    mean = f" Scores are means over {axes}." if axes else ""
    return f"Masked: {masked}.{mean}"


def example(
    layers: Layers,
    rows: Column,
    number: int,
    metadata: Mapping[str, str],
    nodes: Names,
    target_node: Node | None,
    totals: bool = False,
) -> Example:
    """Return one example for a page.

    Args:
        rows: the indices of the example's rows.
        totals: whether to show the sum of each layer.
        nodes: the names of its nodes.
        target_node: the node the prediction is about.
    """
    from maskhooks.viz.page import Example

    if layers.connected:
        from maskhooks.viz.graph import layout

        scores, ends, kinds, labels = layers.edges(rows)
        edges, drawn = _strongest(scores)
        net = _net(ends[:, edges], kinds[:, edges], _within(nodes, ends, kinds, edges), target_node)
        metadata = {**metadata, "drawn": drawn} if drawn else metadata
        return Example(number, scores[:, edges], [labels[e] for e in edges], metadata, net=net, places=layout(net))
    scores, labels = layers.grid(rows)
    patches = layers.images(rows)[0].size if layers.width(rows) else 0
    sums = layers.totals(rows).tolist() if totals else ()
    return Example(number, scores, labels, metadata, layers.width(rows), patches, totals=sums)


def _graph(
    layers: Layers,
    depths: Sequence[str],
    *,
    title: str,
    label: str,
    nodes: Names,
    target_node: Node | None,
    ax: Axes | None,
) -> Figure:
    if not layers.connected:
        raise SettingError(
            "a graph needs edges and the nodes they connect; these positions are not edges. Name the edges with "
            "wrap(model, edges=...), or plot the positions as 'heatmap' or 'bars'"
        )
    from maskhooks.viz.graph import graphs

    scores, ends, kinds, _ = layers.edges()
    edges, drawn = _strongest(scores)
    net = _net(ends[:, edges], kinds[:, edges], _within(nodes, ends, kinds, edges), target_node)
    title = ", ".join(filter(None, [title, drawn]))
    return graphs(scores[:, edges], depths, net, title=title, label=label, ax=ax)


def _strongest(scores: Scored) -> tuple[Column, str]:
    """The edges to draw: all, or for a graph too large to read those with the highest score in any layer.

    Returns:
        The indices of the edges, and a note on the selection.
    """
    count = scores.shape[1]
    if count <= _LARGE:
        return np.arange(count), ""
    best = np.nan_to_num(scores, nan=-1.0).max(0)
    edges: Column = np.sort(np.argsort(-best, kind="stable")[:_DRAWN])
    return edges, f"the {_DRAWN:,} strongest of {count:,} edges"


def _within(nodes: Names, ends: Column, kinds: Column, edges: Column) -> Names:
    """Node names; if some edges are left out, only those of the nodes that the drawn edges connect."""
    if len(edges) == ends.shape[1] or not nodes:
        return nodes
    pairs = zip(kinds[:, edges].ravel().tolist(), ends[:, edges].ravel().tolist(), strict=True)
    there = set(pairs) if kinds.any() else {number for _, number in pairs}
    named = nodes if isinstance(nodes, Mapping) else dict(enumerate(nodes))
    return {node: name for node, name in named.items() if node in there}


def _net(ends: Column, kinds: Column, nodes: Names, target_node: Node | None) -> GraphLayout:
    """The graph of these edges: all nodes if all have names, otherwise those with a name or an edge."""
    from maskhooks.viz.graph import GraphLayout

    if kinds.any():
        return _typed(ends, kinds, nodes, target_node)
    if isinstance(target_node, tuple) or (
        isinstance(nodes, Mapping) and any(isinstance(node, tuple) for node in nodes)
    ):
        raise SettingError("the nodes have only one type here. Name them by their numbers")
    if nodes and not isinstance(nodes, Mapping):
        count = int(ends.max(initial=-1)) + 1
        if len(nodes) < count:
            raise SettingError(f"there are {len(nodes)} names for {count} nodes. Give one for each node")
        return GraphLayout(ends[0], ends[1], list(nodes), target_node)
    called: dict[Any, str] = dict(nodes) if isinstance(nodes, Mapping) else {}
    shown = np.array([*called, *([] if target_node is None else [target_node])], ends.dtype)
    known, places = np.unique(np.append(ends, shown), return_inverse=True)
    source, target = places[: ends.size].reshape(2, -1)
    return GraphLayout(
        source, target, [called.get(int(n), "") for n in known], None if target_node is None else int(places[-1])
    )


def _typed(ends: Column, kinds: Column, nodes: Names, target_node: Node | None) -> GraphLayout:
    """`_net` for several node types, each numbered from 0."""
    from maskhooks.viz.graph import GraphLayout

    called: dict[Any, str] = dict(nodes) if isinstance(nodes, Mapping) else {}
    named = [*called, *([] if target_node is None else [target_node])]
    if (nodes and not isinstance(nodes, Mapping)) or not all(isinstance(node, tuple) for node in named):
        raise SettingError(
            "the nodes have several types here, each numbered from 0. Name them by (type, number), as in "
            "nodes={(0, 2): 'Ada'} and target_node=(0, 2); the columns source_type and target_type hold the types"
        )
    pairs = np.stack([kinds, ends], -1).reshape(-1, 2)
    known, places = np.unique(np.concatenate([pairs, np.array(named, int).reshape(-1, 2)]), axis=0, return_inverse=True)
    places = places.reshape(-1)
    source, target = places[: ends.size].reshape(2, -1)
    middle = None if target_node is None else int(places[-1])
    return GraphLayout(source, target, [called.get((int(k), int(n)), "") for k, n in known], middle, known[:, 0])
