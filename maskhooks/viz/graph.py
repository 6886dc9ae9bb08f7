"""Graphs: edges coloured by score, one graph for each depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from maskhooks.errors import MissingExtraError, SettingError
from maskhooks.viz.figure import COLOURS, Picture, figure_of, visible

_SHAPES = "osD^"  # node markers by type
_SPRING = 400  # above this many nodes, kamada_kawai_layout takes too long


@dataclass(frozen=True)
class GraphLayout:
    """A graph to draw.

    Args:
        source: the source node of each edge.
        target: the target node of each edge.
        nodes: names of the nodes, such as atoms; a node with an empty name is a dot.
        target_node: the node the prediction is about; it gets a ring.
        kinds: the type number of each node if there are several: circles, squares, diamonds, triangles.
    """

    source: npt.NDArray[np.integer]
    target: npt.NDArray[np.integer]
    nodes: Sequence[str]
    target_node: int | None = None
    kinds: npt.NDArray[np.integer] | None = None

    @property
    def shapes(self) -> npt.NDArray[np.integer]:
        """The shape number of each node."""
        return np.zeros(len(self.nodes), int) if self.kinds is None else self.kinds % len(_SHAPES)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.source.tolist(), self.target.tolist(), strict=True))


def layout(net: GraphLayout) -> npt.NDArray[np.float64]:
    """Return node positions, `[node, 2]` in [0, 1]; deterministic.

    Raises:
        MissingExtraError: networkx is not installed.
    """
    try:
        import networkx
    except ImportError as error:
        raise MissingExtraError("networkx", "geometric", "A picture of a graph") from error
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(net.nodes)))
    graph.add_edges_from(pair for pair in net.pairs if pair[0] != pair[1])
    if networkx.is_connected(graph) and len(graph) <= _SPRING:
        found = networkx.kamada_kawai_layout(graph)
    else:
        found = networkx.spring_layout(graph, seed=0, k=2.5 / len(graph) ** 0.5)
    places = np.array([found[node] for node in range(len(net.nodes))], float)
    low, high = places.min(0), places.max(0)
    span = float((high - low).max()) or 1.0
    centred: npt.NDArray[np.float64] = (places - (low + high) / 2) / span + 0.5
    return centred


def ends(
    net: GraphLayout, places: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], offset: float = 0.006
) -> npt.NDArray[np.float64]:
    """Return lines `[edge, end, 2]`; opposite edges run side by side, each shifted to the right of its direction.

    If all opposite edges have equal scores, as when they are gated together, each pair is one line.

    Args:
        scores: `[graph, edge]`.
    """
    offset = 0.0 if _alike(net, scores) else offset
    first, last = places[net.source], places[net.target]
    way = last - first
    length = np.linalg.norm(way, axis=1, keepdims=True)
    right = np.stack([way[:, 1], -way[:, 0]], 1) / np.maximum(length, 1e-9) * offset
    pairs = set(net.pairs)
    both = np.array([(v, u) in pairs and u != v for u, v in net.pairs], bool)[:, None]
    return np.stack([first + right * both, last + right * both], 1)


def graphs(
    scores: npt.ArrayLike,
    names: Sequence[str],
    net: GraphLayout,
    *,
    title: str = "",
    label: str = "P(kept)",
    columns: int = 3,
    ax: Axes | None = None,
) -> Figure:
    """Draw a graph for each row of scores, side by side; edges with higher scores are darker and wider.

    Edges without an opposite edge end in an arrow; self-loops are rings.

    Args:
        scores: `[graph, edge]` in [0, 1]; NaN is not drawn.
        names: names of the graphs.
        net: edges and nodes.
        title: title of the figure.
        label: label of the colour bar.
        columns: number of graphs side by side.
        ax: Axes to draw on, for one graph; None makes a figure.

    Raises:
        SettingError: several graphs for one `ax`.
        MissingExtraError: networkx is not installed.
    """
    values = np.atleast_2d(np.asarray(scores, float))
    if ax is not None and len(names) > 1:
        raise SettingError(
            f"one Axes cannot hold {len(names)} graphs. Select a depth (explanation.select(depth=0)), or leave out ax"
        )
    places = layout(net)
    drawn = ends(net, places, values)
    figure: Figure
    if ax is None:
        across = min(columns, len(names))
        down = -(-len(names) // across)
        figure = Picture(figsize=(3.4 * across + 0.9, 3.4 * down + 0.4), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    else:
        axes, figure = [ax], figure_of(ax)
    for part in axes:
        part.set_axis_off()
    for part, name, row in zip(axes, names, values, strict=False):
        lines = _draw(part, net, places, row, drawn)
        part.set_title(name, fontsize="small", parse_math=False)
    bar = figure.colorbar(lines, ax=axes, label=label, ticks=[0, 0.5, 1], aspect=16, fraction=0.04)
    bar.outline.set_visible(False)
    bar.ax.set_ylim(0, 1)
    return figure


def _alike(net: GraphLayout, scores: npt.NDArray[np.float64]) -> bool:
    """Whether opposite edges have equal scores wherever both exist."""
    known: dict[tuple[int, int], list[npt.NDArray[np.float64]]] = {}
    for pair, column in zip(net.pairs, scores.T, strict=True):
        known.setdefault(pair, []).append(column)
    return all(
        np.array_equal(np.stack(own), np.stack(known[v, u]), equal_nan=True)
        for (u, v), own in known.items()
        if u < v and (v, u) in known
    )


def _draw(
    ax: Axes,
    net: GraphLayout,
    places: npt.NDArray[np.float64],
    row: npt.NDArray[np.float64],
    ends: npt.NDArray[np.float64],
) -> LineCollection:
    small = 1.0 if len(net.nodes) <= 40 else max(0.35, (40 / len(net.nodes)) ** 0.5)
    order = np.argsort(np.nan_to_num(row, nan=-1.0), kind="stable")  # highest scores on top
    shown = order[~np.isnan(row[order])]
    lines = LineCollection(
        list(ends[shown]),
        array=row[shown],
        cmap=COLOURS,
        norm=Normalize(-0.12, 1),  # so that dropped edges stay visible
        linewidths=small * (0.7 + 2.8 * row[shown]),
        zorder=1,
    )
    ax.add_collection(lines)
    every = net.pairs
    pairs = {every[edge] for edge in shown.tolist()}
    for edge in shown.tolist():
        u, v = int(net.source[edge]), int(net.target[edge])
        colour, width = lines.to_rgba(row[edge]), small * (0.7 + 2.8 * row[edge])
        if u == v:
            ring = places[u] + (0, 0.022)
            ax.plot(*ring, "o", ms=11 * small, mfc="none", mec=colour, mew=width, zorder=1)
        elif (v, u) not in pairs:
            style = f"-|>,head_length={4 * small},head_width={2 * small}"
            ax.add_patch(
                FancyArrowPatch(
                    places[u], places[v], arrowstyle=style, color=colour, lw=width,
                    shrinkA=4 * small, shrinkB=7 * small, mutation_scale=1.5, zorder=1,
                )
            )  # fmt: skip
    named = any(net.nodes)
    shapes = net.shapes
    for number in np.unique(shapes).tolist():
        own, size = places[shapes == number].T, (12 if named else 5) * small
        ax.plot(*own, _SHAPES[number], ms=size, mfc="white", mec="0.45", mew=0.8 * small, zorder=2, ls="none")
    if net.target_node is not None:
        ax.plot(*places[net.target_node], "o", ms=17 * small, mfc="none", mec="0.1", mew=1.6, zorder=3)
    for text, place in zip(net.nodes, places, strict=True):
        x, y = place.tolist()
        ax.text(x, y, visible(text, 6), ha="center", va="center", fontsize=7.5 * small, zorder=4, parse_math=False)
    ax.set_aspect("equal")
    ax.set_xlim(-0.08, 1.08)
    ax.set_ylim(-0.08, 1.08)
    return lines
