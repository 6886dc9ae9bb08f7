"""Pictures of graphs, as figures and on the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from maskhooks.errors import SettingError
from maskhooks.explanations import pictures
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.site import Site
from maskhooks.viz.graph import GraphLayout, ends, graphs, layout
from tests.viz.browser import seen_in_browser

pytest.importorskip("networkx")

# A ring of three with both directions between 0 and 1, an edge of its own, a self-loop.
SOURCE, TARGET = np.array([0, 1, 1, 2, 3, 3]), np.array([1, 0, 2, 0, 0, 3])
NET = GraphLayout(SOURCE, TARGET, ["C", "N", "", "<b>"], target_node=1)


def built(layers: int = 2, edges: bool = True) -> Explanation:
    """Two examples, of six edges and two, in several layers."""
    examples = ExampleIndex(torch.tensor([0] * 6 + [1] * 2), 2)
    nodes = {"source": torch.tensor([*SOURCE, 0, 1]), "target": torch.tensor([*TARGET, 1, 0])}
    values = torch.linspace(0, 1, 8)
    scores = [
        Scores(
            Site.parse(f"layers.{depth}:output", "edge feature -> edge"), depth, values.roll(depth), torch.ones(8) > 0,
            example_index=examples, edges=nodes if edges else None,
        )
        for depth in range(layers)
    ]  # fmt: skip
    return Explanation.build(scores, provenance={})


def test_layout_is_the_same_each_time_and_fits() -> None:
    places = layout(NET)
    assert np.array_equal(places, layout(NET))
    assert places.shape == (4, 2)
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)[np.triu_indices(4, 1)]
    assert gaps.min() > 0.2
    scattered = GraphLayout(np.array([0, 2]), np.array([1, 3]), [""] * 5)
    assert np.isfinite(layout(scattered)).all()


def test_edges_in_both_directions_stand_apart() -> None:
    places = layout(NET)
    lines = ends(NET, places, np.linspace(0, 1, 6)[None], offset=0.01)
    assert np.allclose(np.linalg.norm(lines[0, 0] - lines[1, 1]), 0.02)
    assert np.allclose(lines[2], places[[1, 2]])


def test_edges_that_share_their_scores_in_both_directions_are_one_line() -> None:
    places = layout(NET)
    scores = np.array([[0.5, 0.5, 0.1, 0.2, 0.3, 0.4], [np.nan, np.nan, 1, 1, 1, 1]])
    lines = ends(NET, places, scores)
    assert np.allclose(lines[0], places[[0, 1]])
    assert np.allclose(lines[0], lines[1, ::-1])
    scores[0, 1] = 0.6
    assert not np.allclose(ends(NET, places, scores)[0], places[[0, 1]])
    often = GraphLayout(np.array([0, 0, 1]), np.array([1, 1, 0]), ["", ""])
    assert not np.allclose(ends(often, places, np.ones((1, 3)))[0], places[[0, 1]])


def test_a_figure_has_a_graph_for_each_depth() -> None:
    explanation = built()
    figure = explanation.plot(example=0, nodes=NET.nodes, target_node=1)
    first, second = (axes for axes in figure.axes if axes.get_title().startswith("depth"))
    (lines,) = (part for part in first.collections if isinstance(part, LineCollection))
    assert sorted(lines.get_array().tolist()) == pytest.approx((np.arange(6) / 7).tolist(), abs=1e-6)
    assert [text.get_text() for text in first.texts] == ["C", "N", "", "<b>"]
    assert len(first.patches) == 3  # arrows of edges that go one way
    assert second.get_title() == "depth 1"
    assert explanation.plot(example=1).axes[0].get_title() == "depth 0"


def test_a_graph_on_given_axes() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    one = figure.subplots()
    assert built(1).plot(example=0, ax=one) is figure
    with pytest.raises(SettingError, match="one Axes cannot hold 2 graphs"):
        built().plot(example=0, ax=one)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(SettingError, match=r"wrap\(model, edges="):
        built(edges=False).plot(example=0, kind="graph")
    with pytest.raises(SettingError, match="2 names for 4 nodes"):
        built().plot(example=0, nodes=["a", "b"])


def test_nodes_of_a_large_graph_that_have_no_edge_are_not_drawn() -> None:
    ends_ = {"source": torch.tensor([90_000, 7]), "target": torch.tensor([7, 90_000_000])}
    scores = Scores(
        Site.parse("layer:output", "edge feature -> edge"), 0, torch.tensor([0.25, 0.5]), torch.ones(2) > 0, None,
        ExampleIndex(torch.zeros(2).long(), 1), ends_,
    )  # fmt: skip
    axes, _ = Explanation.build([scores], provenance={}).plot(example=0, target_node=90_000).axes
    assert [text.get_text() for text in axes.texts] == ["", "", ""]
    assert [len(line.get_xdata()) for line in axes.lines] == [3, 1]  # nodes, and the ring around one
    axes, _ = Explanation.build([scores], provenance={}).plot(example=0, nodes={8: "b", 7: "a"}).axes
    assert [text.get_text() for text in axes.texts] == ["a", "b", "", ""]


def test_missing_scores_are_left_out() -> None:
    figure = graphs([[0.5, np.nan, 1, 0, 0.2, 0.3]], ["one"], NET)
    (lines,) = (part for part in figure.axes[0].collections if isinstance(part, LineCollection))
    assert len(lines.get_array()) == 5


def test_layers_with_other_messages_are_told_apart_by_their_ends() -> None:
    """A second layer that sends along one edge less, in another order, and along one twice."""
    site = Site.parse("layers.1:output", "edge feature -> edge")
    one = built(1).select(example=0)
    ends_ = {"source": torch.tensor([1, 0, 0]), "target": torch.tensor([0, 1, 1])}
    scores = Scores(
        site, 1, torch.tensor([0.25, 0.5, 0.75]), torch.ones(3) > 0, None, ExampleIndex(torch.zeros(3).long(), 1), ends_
    )
    both = Explanation.concat([one, Explanation.build([scores], provenance={})])
    grid, pairs, _, labels = both._layers().edges()
    found = {
        (*pair, label): column.tolist() for pair, label, column in zip(pairs.T.tolist(), labels, grid.T, strict=True)
    }
    assert len(found) == 6
    assert grid.shape == (2, 7)
    assert (np.isnan(grid[1])).sum() == 4
    assert sorted(column[1] for column in grid.T.tolist() if column[1] == column[1]) == [0.25, 0.5, 0.75]


def data(page: str) -> Any:
    """What a page draws."""
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0])


def test_one_score_for_all_layers_is_called_so() -> None:
    tied = replace(built(1), provenance={"tied": True})
    weights = replace(built(1), provenance={"sites": [{"address": "edge:output", "tags": ["edge", "weight"]}]})
    for one, name in ((tied, "all layers"), (weights, "all layers"), (built(1), "depth 0")):
        assert one.plot(example=0).axes[0].get_title() == name
        assert data(one.to_html())["rows"] == [name.removeprefix("depth ")]


def typed() -> Explanation:
    """Person 0 to film 0 and back, and person 0 to person 1."""
    site = Site.parse("layer:output", "edge feature -> edge")
    ends_ = {"source": [0, 0, 0], "target": [0, 0, 1], "relation": [0, 1, 2]}
    kinds = {"source_type": [0, 1, 0], "target_type": [1, 0, 0]}
    columns = {name: torch.tensor(numbers) for name, numbers in {**ends_, **kinds}.items()}
    scores = Scores(site, 0, torch.rand(3), torch.ones(3) > 0, None, ExampleIndex(torch.zeros(3).long(), 1), columns)
    return Explanation.build([scores], provenance={})


def test_nodes_of_several_types_are_told_apart() -> None:
    axes, _ = typed().plot(nodes={(1, 0): "film", (0, 0): "Ada"}, target_node=(0, 1)).axes
    assert [text.get_text() for text in axes.texts] == ["Ada", "", "film"]
    assert [line.get_marker() for line in axes.lines] == ["o", "s", "o"]  # persons, films, the ring
    graph = data(typed().to_html(target_nodes={0: (1, 0)}))["examples"][0]["graph"]
    assert graph["shapes"] == [0, 0, 1]
    assert not any(graph["loop"])
    assert graph["target"] == 2
    for names in (["Ada", "Bo", "film"], {0: "Ada"}):
        with pytest.raises(SettingError, match="several types here, each numbered from 0"):
            typed().plot(nodes=names)
    with pytest.raises(SettingError, match="nodes have only one type here"):
        built().plot(target_node=(0, 1))


def test_the_page_draws_the_graph_and_the_slider_colours_it(tmp_path: Path) -> None:
    text = built().to_html(nodes={0: NET.nodes}, target_nodes={0: 1})
    script = """
      const first = document.querySelector("article"), edges = [...first.querySelectorAll(".edge")];
      const scores = () => edges.map(edge => Number(getComputedStyle(edge).getPropertyValue("--score")));
      seen.kinds = edges.map(edge => edge.tagName);
      seen.deep = scores();
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      seen.low = scores();
      seen.names = [...first.querySelectorAll("text")].map(node => node.textContent);
      seen.centre = first.querySelectorAll(".node.target").length;
      seen.tips = first.querySelectorAll(".tip").length;
      seen.articles = document.querySelectorAll("article svg").length;
      edges[2].dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 5, clientY: 5 }));
      seen.tip = tip.textContent;
    """
    seen = seen_in_browser(text, script, tmp_path)
    values = np.linspace(0, 1, 8).round(3)
    order = np.lexsort((TARGET, SOURCE))
    assert seen["low"] == pytest.approx(values[:6][order].tolist())
    assert seen["deep"] == pytest.approx(np.roll(values, 1)[:6][order].tolist())
    assert seen["kinds"] == ["line", "line", "line", "line", "line", "circle"]
    assert seen["names"] == ["C", "N", "<b>"]
    assert (seen["centre"], seen["tips"], seen["articles"]) == (1, 3, 2)
    assert "1→2" in seen["tip"]


def test_of_a_large_graph_the_strongest_edges_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_LARGE", 399)
    monkeypatch.setattr(pictures, "_DRAWN", 100)
    count = 400
    values = torch.rand(2, count, generator=torch.Generator().manual_seed(0))
    columns = {"source": torch.arange(count) // 2, "target": (torch.arange(count) * 7) % 150}
    scores = [
        Scores(
            Site.parse(f"layers.{depth}:output", "edge feature -> edge"), depth, row, torch.ones(count) > 0,
            example_index=ExampleIndex(torch.zeros(count, dtype=torch.long), 1), edges=columns,
        )
        for depth, row in enumerate(values)
    ]  # fmt: skip
    explanation = Explanation.build(scores, provenance={})
    strong = values.max(0).values.topk(100).indices.sort().values
    there = {str(node) for node in torch.cat([columns["source"][strong], columns["target"][strong]]).tolist()}
    names = [str(node) for node in range(200)]
    figure = explanation.plot(nodes=names, target_node=3)
    assert figure._suptitle.get_text().endswith("the 100 strongest of 400 edges")  # type: ignore[attr-defined]
    assert len(figure.axes[0].collections[0].get_paths()) == 100
    (shown,) = data(explanation.to_html(nodes={0: names}))["examples"]
    assert ["drawn", "the 100 strongest of 400 edges"] in shown["metadata"]
    assert len(shown["graph"]["lines"]) == len(shown["columns"]) == 100
    assert np.allclose(shown["scores"], values[:, strong], atol=1e-3)
    assert set(shown["graph"]["names"]) == there
