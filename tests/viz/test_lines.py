"""Curves with bands, and examples side by side: their points, shades and tooltips, in a browser too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from maskhooks.viz.graph import GraphLayout, layout
from maskhooks.viz.lines import COLOURS, HIGH, WIDE, Line, lines
from maskhooks.viz.page import Example, page
from maskhooks.viz.sections import Cell, Grid, Section
from maskhooks.viz.side_by_side import Side, SideBySide
from tests.viz.browser import seen_in_browser

ATTACK = "<script>document.title = 'run'</script>"
X = np.linspace(0, 1, 5)


def line(name: str = "a", shift: float = 0.0) -> Line:
    y = np.array([0.9, 0.7, 0.5, 0.4, 0.3]) + shift
    return Line(name, X, y, y - 0.05, y + 0.05)


def places(points: str) -> list[tuple[float, float]]:
    pairs = [point.split(",") for point in points.split()]
    return [(float(x), float(y)) for x, y in pairs]


class TestLines:
    def test_points_go_from_left_to_right_and_down(self) -> None:
        (drawn,) = lines("t", [line()], x="share", y="p").lines
        xs, ys = zip(*places(drawn.points), strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys)  # y counts downwards
        assert all(0 < x < WIDE for x in xs)
        assert all(0 < y < HIGH for y in ys)
        assert drawn.marks[1][2] == "a: 0.700 [0.650, 0.750] at 25%"

    def test_a_value_lies_on_its_tick(self) -> None:
        shown = lines("t", [line()], x="share", y="p")
        at = {text: place for place, text in shown.up}
        (drawn,) = shown.lines
        low, high, ticks = at["0.4"], at["0.6"], [float(text) for _, text in shown.up]
        assert places(drawn.points)[2][1] == pytest.approx((low + high) / 2, abs=0.1)
        assert min(ticks) <= 0.25
        assert max(ticks) >= 0.95

    def test_bands_go_there_and_back(self) -> None:
        (drawn,) = lines("t", [line()], x="share", y="p").lines
        band = places(drawn.band)
        assert [x for x, _ in band] == [x for x, _ in places(drawn.points)] * 1 + [
            x for x, _ in reversed(places(drawn.points))
        ]
        (bare,) = lines("t", [Line("b", X, X, X * np.nan, X * np.nan)], x="", y="").lines
        assert bare.band == ""
        assert bare.marks[0][2] == "b: 0.000 at 0%"

    def test_both_pictures_have_one_axis(self) -> None:
        one, other = line(), line("b", -0.2)
        first, second = (lines("t", [here], x="", y="", beside=[one, other]) for here in (one, other))
        assert first.up == second.up

    def test_more_lines_than_colours_are_dashed(self) -> None:
        drawn = lines("t", [line(str(number)) for number in range(COLOURS + 1)], x="", y="").lines
        assert (drawn[0].colour, drawn[0].dashed) == (0, False)
        assert (drawn[-1].colour, drawn[-1].dashed) == (0, True)

    @pytest.mark.parametrize("values", [np.full(5, 0.5), np.full(5, np.nan), np.array([-3.0, 4, 1, 0, 2])])
    def test_flat_missing_and_wide_curves(self, values: np.ndarray) -> None:
        shown = lines("t", [Line("a", X, values, values, values)], x="", y="")
        assert 2 <= len(shown.up) <= 12
        assert all(0 <= place <= HIGH for place, _ in shown.up)


class TestSides:
    def test_shades_are_shares_of_the_largest(self) -> None:
        side = Side.of("loo", "score", Example(0, [[0.5, -2.0, np.nan, 0.0]], ["a", "b", "c", "d"], {}))
        assert [shade.score for shade in side.shades] == [0.25, 1.0, 0.0, 0.0]
        assert [shade.style for shade in side.shades] == ["", "below on", "none", ""]
        assert side.shades[1].tip == "b: -2"
        assert side.note == "score, largest 2"

    def test_scores_of_zero(self) -> None:
        side = Side.of("loo", "score", Example(0, [[0.0, 0.0]], ["a", "b"], {}))
        assert [shade.score for shade in side.shades] == [0.0, 0.0]

    def test_graphs(self) -> None:
        pytest.importorskip("networkx")
        net = GraphLayout(np.array([0, 1, 2, 2]), np.array([1, 2, 0, 2]), ["C", "N", ""], 1)
        labels = ["0-1", "1-2", "2-0", "2-2"]
        side = Side.of("loo", "s", Example(0, [[1, 2, 3, 4]], labels, {}, net=net, places=layout(net)))
        assert side.network is not None
        assert side.network.lines[3][:2] == side.network.lines[3][2:]
        assert [name for *_, name, _ in side.network.nodes] == ["C", "N", ""]
        assert [target for *_, target in side.network.nodes] == [False, True, False]


def test_a_page_shows_and_escapes_them(tmp_path: Path) -> None:
    words = [ATTACK, "film"]
    sides = [Side.of(ATTACK, "score", Example(0, [[1.0, -0.5]], words, {}))]
    pixels = [Side.of("loo", "score", Example(0, [[0, 1, 2, 3]], ["p"] * 4, {}, width=2))]
    parts = [
        Grid("Method", [("m", "")], ["a"], [[Cell(0.5, "tip", "0.425", "0.3 to 0.5", strong=True)]]),
        lines(ATTACK, [line(ATTACK)], x="share", y="p"),
        SideBySide(ATTACK, [("prediction", ATTACK)], sides),
        SideBySide("pixels", [], pixels),
    ]
    text = page([], [], title="t", sections=[Section("s", "t", parts, wide=True)])
    assert text.count("<script") == 2
    assert re.search(r"<b>0\.425</b><small>0\.3 to 0\.5</small>", text)
    seen = seen_in_browser(
        text,
        """
        seen.title = document.title;
        seen.tokens = [...document.querySelectorAll(".side .tokens:not(.patches) span")].map(one => one.textContent);
        const colour = node => getComputedStyle(node).backgroundColor;
        seen.shades = [...document.querySelectorAll(".side .tokens:not(.patches) span")].map(colour);
        const grid = document.querySelector(".patches");
        seen.columns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
        seen.stroke = getComputedStyle(document.querySelector(".curves polyline")).stroke;
        seen.lines = document.querySelectorAll(".curves polyline").length;
        """,
        tmp_path,
    )
    assert seen["title"] == "t"
    assert seen["tokens"] == words
    assert seen["shades"] == ["rgb(27, 98, 184)", "rgba(178, 24, 43, 0.5)"]
    assert (seen["columns"], seen["lines"]) == (2, 1)
    assert seen["stroke"] == "rgb(27, 98, 184)"
