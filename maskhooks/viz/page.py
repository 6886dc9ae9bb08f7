"""Page: an HTML page with sections, and the scores of many examples with a slider for the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskhooks.viz.amount import amount
from maskhooks.viz.chart import HIGH, WIDE
from maskhooks.viz.sections import Section

if TYPE_CHECKING:
    from maskhooks.viz.graph import GraphLayout

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Example:
    """An example on the page.

    Args:
        number: its index.
        scores: `[row, column]` in [0, 1]; NaN where there is none.
        columns: names of the columns, such as tokens.
        metadata: metadata, such as `{"prediction": ..., "target": ...}`.
        width: patches per image row; 0 if the columns are not patches.
        patches: how many of the columns are patches; others, such as a class token, follow them. Default: all.
        net: the graph whose edges are the columns.
        places: positions of its nodes, `[node, 2]` in [0, 1].
        totals: what each row has in all; empty shows none.
    """

    number: int
    scores: npt.ArrayLike
    columns: Sequence[str]
    metadata: Mapping[str, str]
    width: int = 0
    patches: int | None = None
    net: GraphLayout | None = None
    places: npt.ArrayLike = ()
    totals: Sequence[float] = ()


def page(
    examples: Sequence[Example],
    rows: Sequence[str],
    *,
    title: str,
    note: str = "",
    label: str = "P(kept)",
    top: float = 1.0,
    threshold: float | None = 0.5,
    zero_note: str = "",
    unit: str = "",
    provenance: Mapping[str, Any] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """Return a self-contained page; it opens from a file or in a notebook's frame.

    All text is escaped: sections as HTML; examples in one block of JSON without `<`, `>` and `&`, which the script
    writes as text, never as HTML. The page's content security policy forbids every connection.

    Args:
        examples: shown one below the other.
        rows: names of the rows of all examples, such as depths, lowest first.
        title: the heading.
        note: a sentence below the heading.
        label: what scores are called, in the legend and in tooltips.
        top: the score at which the colours end.
        threshold: a position with a score above it is underlined; None underlines none.
        zero_note: a sentence on what a score of 0 says.
        unit: of the examples' totals.
        provenance: shown at the end, collapsed.
        sections: shown above the examples.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    negative = any(bool((np.nan_to_num(np.asarray(one.scores, float)) < 0).any()) for one in examples)
    data = {
        "rows": list(rows),
        "label": label,
        "bottom": -top if negative else 0,
        "top": top,
        "threshold": threshold,
        "examples": [_as_json(example, len(rows), unit) for example in examples],
        "edges": any(example.net is not None for example in examples),
        "provenance": provenance or {},
    }
    return environment.get_template("page.html.jinja").render(
        title=title, note=note, label=label, zero_note=zero_note, data=data, sections=sections, size=(WIDE, HIGH)
    )


def _as_json(example: Example, rows: int, unit: str) -> dict[str, Any]:
    scores = np.asarray(example.scores, float).reshape(rows, len(example.columns))
    most = max(map(abs, example.totals), default=0.0) or 1.0
    return {
        "number": example.number,
        "columns": list(example.columns),
        "metadata": [[name, text] for name, text in example.metadata.items()],
        "width": example.width,
        "patches": 0 if not example.width else len(example.columns) if example.patches is None else example.patches,
        "totals": [[round(abs(one) / most, 3), f"{amount(one)} {unit} in all"] for one in example.totals],
        "scores": [[None if score != score else score for score in row] for row in scores.round(3).tolist()],
        "graph": None if example.net is None else _drawn(example.net, np.asarray(example.places, float), scores),
    }


def _drawn(net: GraphLayout, places: npt.NDArray[np.float64], scores: npt.NDArray[np.float64]) -> dict[str, Any]:
    """A graph in the script's format: lines by their ends, and nodes with their names."""
    from maskhooks.viz.graph import ends

    pairs = set(net.pairs)
    upright = places * (1, -1) + (0, 1)
    return {
        "lines": ends(net, upright, scores).round(4).reshape(-1, 4).tolist(),
        "arrow": [u != v and (v, u) not in pairs for u, v in net.pairs],
        "loop": [u == v for u, v in net.pairs],
        "nodes": upright.round(4).tolist(),
        "names": list(net.nodes),
        "shapes": net.shapes.tolist(),
        "target": net.target_node,
    }
