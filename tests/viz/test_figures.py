"""Figures of one example: heatmaps, bars and images."""

from __future__ import annotations

import io
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from maskhooks.errors import SettingError
from maskhooks.viz.bars import bars
from maskhooks.viz.figure import Picture, visible
from maskhooks.viz.heatmap import heatmap
from maskhooks.viz.image import images


def drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_heatmap_has_depth_0_at_the_bottom() -> None:
    scores = np.array([[0.0, 0.5, 1.0], [1.0, np.nan, 0.0]])
    figure = heatmap(scores, ["0", "1"], ["$x_1$", "b", "\n"], title="50 $ & $", x="token")
    axes, bar = figure.axes
    mesh = axes.collections[0]
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), -1), np.nan_to_num(scores, nan=-1))
    assert not axes.yaxis_inverted()
    assert mesh.get_clim() == (0, 1)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["$x_1$", "b", "↵"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    assert bar.get_ylabel() == "P(kept)"
    assert drawn(figure)[1:4] == b"PNG"


def test_long_sentences_go_on_below() -> None:
    words = [f"word{i}" for i in range(100)]
    figure = heatmap(np.random.default_rng(0).random((4, 100)), list("0123"), words)
    panels = figure.axes[:-1]
    assert len(panels) == 3
    assert [t.get_text() for panel in panels for t in panel.get_xticklabels()] == words
    assert len({panel.get_xlim() for panel in panels}) == 1  # cells are of one width
    assert figure.get_size_inches()[0] < 13
    drawn(figure)
    boxes = [t.get_window_extent() for t in panels[0].get_xticklabels()]
    assert min(b.x1 - a.x1 for a, b in itertools.pairwise(boxes)) > 10  # words end apart


def test_bars_stand_side_by_side() -> None:
    scores = np.array([[1.0, 0.0, 1.0], [0.9, 0.2, np.nan]])
    figure = bars(scores, ["truth", "DiffMask"], list("831"))
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(scores.reshape(-1).tolist(), nan_ok=True)
    lefts = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(right <= left + 1e-9 for (_, right), (left, _) in itertools.pairwise(lefts))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["truth", "DiffMask"]
    assert bars(scores[:1], ["truth"], list("831")).axes[0].get_legend() is None
    drawn(figure)


def test_bars_of_long_sentences_go_on_below() -> None:
    figure = bars(np.full((1, 90), 0.5), ["0"], [str(i) for i in range(90)], colours=["red"])
    assert len(figure.axes) == 3
    assert sum(len(axes.patches) for axes in figure.axes) == 90
    drawn(figure)


def test_images_have_row_0_at_the_top() -> None:
    scores = np.random.default_rng(0).random((6, 3, 5))
    figure = images(scores, [f"depth {i}" for i in range(6)], title="cat")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [f"depth {i}" for i in range(6)]
    np.testing.assert_array_equal(shown[4].images[0].get_array(), scores[4])
    assert shown[0].images[0].origin == "upper"
    drawn(figure)
    with pytest.raises(SettingError, match="one Axes cannot hold 6 images"):
        images(scores, ["x"] * 6, ax=Figure().subplots())


def test_labels_show_blanks_and_stay_short() -> None:
    assert visible(" ") == "␣"
    assert visible("a\tb\n") == "a⇥b↵"
    assert visible(" word") == " word"
    assert visible("x" * 30, max_length=5) == "xxxx…"


def test_a_notebook_shows_a_picture_and_settings_stay() -> None:
    before = dict(matplotlib.rcParams)
    figure = heatmap([[0.5]], ["0"], ["a"])
    assert isinstance(figure, Picture)
    assert figure._repr_png_()[1:4] == b"PNG"
    assert dict(matplotlib.rcParams) == before
