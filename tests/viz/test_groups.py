"""Bars of groups: their order, error bars and names."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from maskhooks.viz.groups import groups


def names(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_the_first_group_is_at_the_top() -> None:
    figure = groups(["a", "b"], [2.0, 1.0], counts=[1200, 3])
    assert names(figure) == ["a  (1,200)", "b  (3)"]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2, 1]


def test_error_bars_are_where_there_is_an_error() -> None:
    figure = groups(["a", "b", "c"], [2.0, 1.0, 0.5], [0.25, np.nan, 0.5])
    (lines,) = [one for one in figure.axes[0].collections if hasattr(one, "get_segments")]
    segments = lines.get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[1.75, 2.25], [0.0, 1.0]]
    assert [segment[0, 1] for segment in segments] == [0, 2]


def test_many_groups_leave_out_the_middle() -> None:
    figure = groups([str(index) for index in range(50)], np.arange(50.0), max_groups=5)
    assert sorted(names(figure)) == sorted(["0", "1", "2", "48", "49", "… 45 more …"])
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0, 1, 2, 48, 49]
    assert [bar.get_y() + bar.get_height() / 2 for bar in figure.axes[0].patches] == pytest.approx([0, 1, 2, 4, 5])


def test_names_are_taken_literally_and_axes_are_drawn_on() -> None:
    figure = Figure()
    axes = figure.subplots()
    assert groups(["$x^2$", "\n", "y" * 80], [1.0, 2.0, 3.0], ax=axes) is figure
    assert names(figure) == ["$x^2$", "↵", "y" * 23 + "…"]
    figure.canvas.draw()


def test_nothing_is_a_picture_too() -> None:
    figure = groups([], [])
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined] # a Picture
    assert names(figure) == []
    assert list(figure.axes[0].patches) == []
