"""Side by side: one example with the scores of several methods, as the values that the page's template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from maskhooks.viz.page import Example

_DARK = 0.7  # from this shade on, text is light


@dataclass(frozen=True)
class Shade:
    """A position: its text, shade in [0, 1] and tooltip, whether its score is below 0, and whether it has one."""

    text: str
    score: float
    below: bool
    tip: str
    scored: bool = True

    @property
    def style(self) -> str:
        """The classes of its element."""
        return " ".join(
            name
            for name, is_so in {"below": self.below, "on": self.score > _DARK, "none": not self.scored}.items()
            if is_so
        )


@dataclass(frozen=True)
class Network:
    """A graph in picture units of 100: lines with the shades of their edges, self-loops among them, and nodes.

    Attributes:
        lines: x and y of both ends of each edge; equal ends are a self-loop.
        nodes: x, y, name and whether the prediction is about it.
    """

    lines: Sequence[tuple[float, float, float, float]]
    nodes: Sequence[tuple[float, float, str, bool]]


@dataclass(frozen=True)
class Side:
    """The scores of one method.

    Attributes:
        name: the method.
        note: in small type after it.
        shades: one for each position.
        width: patches in an image row; 0 for other positions.
        network: the graph whose edges the positions are.
    """

    name: str
    note: str
    shades: Sequence[Shade]
    width: int = 0
    network: Network | None = None

    @classmethod
    def of(cls, name: str, label: str, example: Example) -> Side:
        """Return the first row of an example's scores, shaded by their share of the largest.

        Args:
            name: the method.
            label: what its scores are called.
            example: has the scores.
        """
        scores = np.asarray(example.scores, np.float64)[0]
        largest = float(np.abs(np.nan_to_num(scores)).max(initial=0.0))
        shades = [
            Shade(
                text,
                round(abs(score) / largest, 3) if largest and score == score else 0.0,
                score < 0,
                f"{text}: {score:.3g}",
                score == score,
            )
            for text, score in zip(example.columns, scores.tolist(), strict=True)
        ]
        return cls(name, f"{label}, largest {largest:.2g}", shades, example.width, _network(example, scores))


@dataclass(frozen=True)
class SideBySide:
    """One example with the scores of several methods.

    Attributes:
        title: what the example is.
        facts: names and texts, such as its prediction.
        sides: the methods, in order.
    """

    kind: ClassVar[str] = "side_by_side"
    title: str
    facts: Sequence[tuple[str, str]]
    sides: Sequence[Side]

    @property
    def pictures(self) -> bool:
        """Whether the sides are images or graphs."""
        return any(side.width or side.network is not None for side in self.sides)


def _network(example: Example, scores: np.ndarray) -> Network | None:
    if example.net is None:
        return None
    from maskhooks.viz.graph import ends

    net = example.net
    places = np.asarray(example.places, np.float64) * (1, -1) + (0, 1)
    found = (6 + 88 * ends(net, places, scores[None])).round(1).reshape(-1, 4)
    nodes = (6 + 88 * places).round(1).tolist()
    return Network(
        [(x1, y1, x2, y2) for x1, y1, x2, y2 in found.tolist()],
        [
            (x, y, name, number == net.target_node)
            for number, ((x, y), name) in enumerate(zip(nodes, net.nodes, strict=True))
        ],
    )
