"""Charts of a run: a line over steps, its scale, its ticks and its running mean."""

from __future__ import annotations

import numpy as np
import pytest

from maskhooks.viz.chart import HIGH, WIDE, Chart, Point, chart, extremes, running_mean, thinned, ticks


def points(text: str) -> np.ndarray:
    return np.array([[float(number) for number in point.split(",")] for point in text.split()])


def drawn(**settings: object) -> Chart:
    values = np.linspace(0, 2, 101)
    return chart("x", np.arange(101), values, **{"last": 100, "top": 1.0, **settings})  # type: ignore[arg-type]


def test_the_line_goes_from_left_to_right_and_up_to_the_top() -> None:
    line = points(drawn().raw)
    assert (np.diff(line[:, 0]) > 0).all()
    assert line[0].tolist() == [36, HIGH - 16]
    assert line[50].tolist() == [pytest.approx(36 + (WIDE - 44) / 2), 10]
    assert line[-1].tolist() == [WIDE - 8, 10]  # twice as high as the axis, drawn at its end


def test_marks_and_lines_have_the_same_axes() -> None:
    found = drawn(marks=[Point(100.0, 0.5, "a", filled=False)], hline=0.5, vline=50.0)
    middle = (HIGH - 16 + 10) / 2
    assert found.marks == [Point(WIDE - 8.0, middle, "a", filled=False)]
    assert (found.hline, found.vline) == (middle, 36 + (WIDE - 44) / 2)
    assert [text for _, text in drawn(percent=True).ticks] == ["0%", "50%", "100%"]


def test_one_value_is_a_dot_and_none_is_nothing() -> None:
    assert len(points(chart("x", [3], [0.5], last=10, top=1.0).raw)) == 2
    assert chart("x", [], [], last=0, top=1.0).raw == ""


def test_long_runs_become_few_points() -> None:
    steps, values = np.arange(1e5), np.random.default_rng(0).random(100_000)
    values[54_321] = 7
    found = chart("x", steps, values, last=100_000, top=8.0)
    assert len(points(found.raw)) <= 300
    assert len(points(found.smooth)) <= 150
    assert points(found.raw)[:, 1].min() < points(found.smooth)[:, 1].min() - 40  # the peak stays, and is not smooth
    x, y = extremes(steps, values, 10)
    assert len(x) == 10
    assert (np.diff(x) > 0).all()
    assert 7 in y
    assert thinned(steps, values, 3)[0].tolist() == [0, 50_000, 99_999]


def test_the_running_mean_is_over_what_is_there() -> None:
    values = np.arange(10.0)
    np.testing.assert_allclose(running_mean(values, 0.3), [0.5, 1, 2, 3, 4, 5, 6, 7, 8, 8.5])
    np.testing.assert_array_equal(running_mean(values[:1]), [0])
    assert len(running_mean(values[:0])) == 0


@pytest.mark.parametrize(
    ("top", "expected"),
    [(1.0, [0, 0.5, 1]), (0.5, [0, 0.2, 0.4]), (0.03, [0, 0.01, 0.02, 0.03]), (7.3, [0, 2, 4, 6]), (1e-6, None)],
)
def test_ticks_are_round(top: float, expected: list[float] | None) -> None:
    found = ticks(top)
    assert 2 <= len(found) <= 4
    assert found[-1] <= top
    assert expected is None or found == expected
