"""The profile over layers, against plain loops over rows; its pictures and its section of a page."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import maskhooks
from maskhooks.errors import SettingError
from maskhooks.explanations.analyses import kept_by
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.profile import lost, plot_profile, profile, profile_sections
from maskhooks.explanations.score_labels import ATTENTION, ATTRIBUTION, BITS, KEPT_OR_ERASED, LOST, P_KEPT, score_label
from maskhooks.explanations.shards import Shards
from maskhooks.sites.site import Site
from maskhooks.viz.sections import Bars

TOKENS = "batch token hidden -> batch token"
MAP, HEADS = (
    "batch channel row column -> batch row column",
    "batch token (head dim) -> batch token head, head=2",
)
WORDS = [["[CLS]", "not", "bad", "[SEP]"], ["[CLS]", "dull", "[SEP]"]]
VALID = torch.tensor([[True, True, True, True], [True, True, True, False]])
#: Bits by layer, example and token; the second layer has more than the first.
VALUES = torch.tensor(
    [
        [[40.0, 30.0, 20.0, 10.0], [5.0, 15.0, 10.0, 999.0]],
        [[50.0, 40.0, 10.0, 10.0], [10.0, 20.0, 12.0, 999.0]],
        [[60.0, 0.0, 5.0, 0.0], [30.0, 0.0, 0.0, 999.0]],
    ]
)


def made(
    values: Tensor = VALUES, label: str | None = BITS, first: int = 0, depths: tuple[int, ...] = (0, 1, 2)
) -> Explanation:
    sites = [Site.parse(f"layer.{number}:output", TOKENS) for number in range(len(values))]
    parts = [Scores(site, depth, one, VALID, WORDS) for site, depth, one in zip(sites, depths, values, strict=True)]
    known = [{"prediction": "good"}, {"prediction": "bad"}]
    provenance = {} if label is None else {"score_label": label}
    return Explanation.build(parts, provenance=provenance, metadata=known, start_index=first)


def maps(*sizes: int) -> Explanation:
    """Maps of several sizes, all of whose places have one bit."""
    parts = [
        Scores(Site.parse(f"{size}:output", MAP), depth, torch.ones(2, size, size), torch.ones(2, size, size).bool())
        for depth, size in enumerate(sizes)
    ]
    return Explanation.build(parts, provenance={"score_label": BITS})


def test_the_profile_of_a_few_numbers() -> None:
    first, second, last = profile(made())
    assert (first.site, first.depth, first.unit) == ("layer.0:output", 0, "bits")
    assert (first.positions, first.examples) == (7, 2)
    assert first.mean == pytest.approx(130 / 7)
    assert first.mean_deviation == pytest.approx(abs(25 - 10) / math.sqrt(2))
    assert first.total == pytest.approx((100 + 30) / 2)
    assert first.total_deviation == pytest.approx(70 / math.sqrt(2))
    assert first.lost == pytest.approx(-11)  # 100 - 110 and 30 - 42: not cut at 0
    assert first.lost_deviation == pytest.approx(2 / math.sqrt(2))
    assert second.lost == pytest.approx(((110 - 65) + (42 - 30)) / 2)
    assert math.isnan(last.lost)
    assert math.isnan(last.lost_deviation)


def test_the_profile_is_what_a_loop_over_examples_finds() -> None:
    whole = Explanation.concat([made(torch.rand(3, 2, 4) * 10, first=2 * at) for at in range(6)])
    rows = whole.to_pandas().query("valid")
    sums = rows.groupby(["example", "depth"])["score"].sum().unstack()
    means = rows.groupby(["example", "depth"])["score"].mean().unstack()
    for at, row in enumerate(profile(whole)):
        assert row.total == pytest.approx(sums[at].mean())
        assert row.total_deviation == pytest.approx(sums[at].std())
        assert row.mean == pytest.approx(rows[rows["depth"] == at]["score"].mean())
        assert row.mean_deviation == pytest.approx(means[at].std())
        if at < 2:
            assert row.lost == pytest.approx((sums[at] - sums[at + 1]).mean())
            assert row.lost_deviation == pytest.approx((sums[at] - sums[at + 1]).std())
    table = pd.DataFrame(profile(whole))
    assert table["total"].diff().dropna().tolist() == pytest.approx((-table["lost"].iloc[:-1]).tolist())


def test_files_of_any_number_are_parts(tmp_path: Any) -> None:
    parts = [made(torch.rand(3, 2, 4), first=2 * at) for at in range(3)]
    shards = Shards.open(tmp_path / "explained", {})
    for number, part in enumerate(parts):
        shards.write(number, part)
    found, expected = (
        pd.DataFrame(profile(one)) for one in (Shards(tmp_path / "explained"), Explanation.concat(parts))
    )
    pd.testing.assert_frame_equal(found, expected)


def test_one_example_has_no_spread_and_layers_may_lack_examples() -> None:
    alone = profile(made().select(example=1))
    assert [row.total for row in alone] == [30, 42, 30]
    assert all(math.isnan(row.total_deviation) for row in alone)
    short = Explanation.concat([made().select(example=0), made().select(example=1, depth=[0, 2])])
    first, second, last = profile(short)
    assert [row.examples for row in (first, second, last)] == [2, 1, 2]
    assert (first.lost, second.lost) == (-10, 45)  # of the example that both have


def test_depths_need_not_follow_without_a_gap() -> None:
    first, _ = profile(made().select(depth=[0, 2]))
    assert (first.depth, first.lost) == (0, pytest.approx(17.5))


def test_masks_have_a_number_of_positions_kept() -> None:
    for label in (P_KEPT, KEPT_OR_ERASED, None):
        row = profile(made(VALUES.clamp(max=1), label))[0]
        assert (row.unit, row.total, row.mean) == ("positions kept", 3.5, 1.0)


def test_heads_count_each() -> None:
    parts = [
        Scores(Site.parse(f"{depth}:output", HEADS), depth, torch.full((2, 4, 2), 3.0 - depth), VALID, WORDS)
        for depth in range(2)
    ]
    explanation = Explanation.build(parts, provenance={"score_label": BITS})
    row = profile(explanation)[0]
    assert (row.positions, row.mean, row.total, row.lost) == (14, 3.0, 21.0, 7.0)
    assert set(lost(explanation)["score"].tolist()) == {1.0}


def test_maps_of_other_sizes_are_compared_by_totals() -> None:
    explanation = maps(8, 4, 2)
    assert [(row.mean, row.total, row.lost) for row in profile(explanation)][:2] == [(1, 64, 48), (1, 16, 12)]
    with pytest.raises(SettingError, match=r"8:output and 4:output have different positions.*profile\(explanation\)"):
        lost(explanation)
    same = Explanation.concat([explanation.select(depth=1), maps(4, 4).select(depth=0)])
    assert lost(same)["score"].tolist() == [0.0] * 32


@pytest.mark.parametrize("label", [ATTENTION, ATTRIBUTION, "relevance"])
def test_scores_that_do_not_add_up_are_refused_with_a_way_out(label: str) -> None:
    explanation = made(label=label)
    for refused in (profile, lost, lambda one: one.plot(kind="profile")):
        with pytest.raises(SettingError, match=rf"'{label}' do not add up over positions.*IBA.*kept_by.*'heatmap'"):
            refused(explanation)
    assert len(kept_by(explanation, lambda _: "all")) == 3  # the ways out
    assert isinstance(explanation.plot(kind="heatmap"), Figure)
    assert profile_sections(explanation) == []


def test_layers_that_are_not_in_a_row_are_refused() -> None:
    with pytest.raises(SettingError, match=r"layer\.1:output and layer\.2:output have the same depth, 1"):
        profile(made(depths=(0, 1, 1)))
    with pytest.raises(SettingError, match="same depth"):
        made(depths=(0, 1, 1)).plot(kind="profile")
    with pytest.raises(SettingError, match="no rows with a valid position"):
        profile(made().select(valid=False))
    one = made().select(depth=0)
    assert [math.isnan(row.lost) for row in profile(one)] == [True]
    for refused in (lost, lambda explanation: explanation.plot(kind="profile")):
        with pytest.raises(SettingError, match="one"):
            refused(one)
    with pytest.raises(SettingError, match="several Axes"):
        made().plot(kind="profile", ax=Figure().subplots())


def test_what_a_token_loses_is_an_explanation() -> None:
    explanation = made()
    found = lost(explanation)
    assert found.sites == ("layer.0:output", "layer.1:output")
    scores, depths, tokens = found.matrix(example=0)
    assert (depths, tokens) == (["0", "1"], WORDS[0])
    assert scores.tolist() == [[-10, -10, 10, 0], [-10, 40, 5, 10]]
    assert score_label(found.provenance) == LOST
    assert found.metadata == explanation.metadata
    assert float(found.select(depth=0)["score"].sum()) / 2 == pytest.approx(profile(explanation)[0].lost)
    picture = found.plot()
    assert picture.axes[0].collections[0].get_clim() == (-40, 40)
    assert picture.axes[-1].get_ylabel() == "bits lost to the next layer"
    page = found.to_html()
    assert "Where is information lost?" in page
    assert "one half" not in page


def test_losses_do_not_depend_on_the_order_of_rows() -> None:
    whole = made()
    order = np.random.default_rng(0).permutation(len(whole))
    mixed = Explanation({n: column[order] for n, column in whole.columns.items()}, whole.sites, whole.provenance)
    for depth in (0, 1):
        rows = lost(mixed).select(depth=depth)
        keys = np.lexsort([rows["position"], rows["example"]])
        assert rows["score"][keys].tolist() == lost(whole).select(depth=depth)["score"].tolist()


def test_the_label_of_losses_reaches_all_parts_of_the_provenance() -> None:
    one, other = made(), made(first=2)
    other.provenance["seed"] = 1
    both = Explanation.concat([one, other])
    assert "of" in both.provenance
    assert score_label(lost(both).provenance) == LOST
    assert score_label(both.provenance) == BITS
    masks = lost(made(VALUES.clamp(max=1), P_KEPT))
    assert score_label(masks.provenance) == "P(kept) lost to the next layer"


def widths(axes: Axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]


def test_a_picture_shows_tokens_totals_and_losses() -> None:
    heat, whole, less, bar = made().plot(kind="profile", example=1).axes
    assert heat.collections[0].get_array().shape == (3, 3)
    assert (widths(whole), widths(less)) == ([30, 42, 30], [-12, 12])
    assert bar.get_ylabel() == "information in bits"
    assert (whole.get_title("left"), whole.get_xlabel()) == ("all positions", "bits")
    assert (less.get_title("left"), less.get_xlabel()) == ("lost on the way up", "bits (red: gained)")
    assert heat.get_ylim() == whole.get_ylim() == less.get_ylim() == (0, 3)
    assert [place.get_y() + place.get_height() / 2 for place in less.patches] == [1, 2]  # type: ignore[attr-defined]
    gained, loss = (place.get_facecolor() for place in less.patches)
    assert gained[0] > gained[2]
    assert loss[2] > loss[0]
    assert [text.get_text() for text in less.texts] == ["-12", "12"]
    falling = made(VALUES.flip(0)).plot(kind="profile", example=1).axes
    assert falling[2].get_xlabel() == "bits (red: gained)"
    assert (
        made(torch.tensor([3.0, 2.0, 1.0])[:, None, None] * VALUES[:1]).plot(kind="profile").axes[2].get_xlabel()
        == "bits"
    )


@pytest.mark.parametrize("count", [30, 100])
def test_six_layers_of_many_tokens_can_be_read(count: int) -> None:
    values = 3000 * torch.rand(6, 1, count)
    parts = [
        Scores(Site.parse(f"{depth}:output", TOKENS), depth, one, torch.ones(1, count).bool(), [["word"] * count])
        for depth, one in enumerate(values)
    ]
    figure = Explanation.build(parts, provenance={"score_label": BITS}).plot(kind="profile")
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_ylabel() == "depth"]
    whole, less = (axes for axes in figure.axes if axes.get_xlabel().startswith("bits"))
    assert sum(len(panel.get_xticklabels()) for panel in panels) == count
    boxes = [label.get_window_extent() for label in panels[0].get_xticklabels()]
    assert min(right.x1 - left.x1 for left, right in itertools.pairwise(boxes)) > 10
    top, beside = panels[0].get_window_extent(), whole.get_window_extent()
    assert (beside.y0, beside.y1) == pytest.approx((top.y0, top.y1), abs=1)  # rows and bars stand side by side
    for axes in (whole, less):
        texts = [text.get_window_extent() for text in axes.texts]
        assert len(texts) == len(axes.patches)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(texts, 2))
        assert all(text.x0 >= 0 and text.x1 <= figure.bbox.x1 for text in texts)


def test_images_stand_beside_totals() -> None:
    axes = maps(8, 4, 2).plot(kind="profile").axes
    assert [one.get_title() for one in axes if one.images] == ["depth 0", "depth 1", "depth 2"]
    whole, less = (one for one in axes if one.get_xlabel())
    assert (widths(whole), widths(less)) == ([64, 16, 4], [48, 12])
    assert [label.get_text() for label in whole.get_yticklabels()] == ["depth 0", "depth 1", "depth 2"]


def test_a_picture_of_many_examples() -> None:
    rows = profile(made())
    figure = plot_profile(rows)
    whole, less = figure.axes
    assert widths(whole) == pytest.approx([row.total for row in rows])
    assert widths(less) == pytest.approx([row.lost for row in rows[:-1]])
    assert len(whole.containers) == len(less.containers) == 2  # bars, and their errors
    assert "2 examples" in figure.get_suptitle()
    assert plot_profile(profile(made().select(example=0)), title="mine").get_suptitle() == "mine"


def bars_of(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_the_page_has_the_profile() -> None:
    text = made().to_html()
    assert bars_of(text) == ["Information at each depth", "Examples"]
    assert text.count('class="below"') == 1
    assert "-11 ± 1.41" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert data["threshold"] is None
    assert data["examples"][0]["totals"] == [
        [0.909, "100 bits in all"],
        [1.0, "110 bits in all"],
        [0.591, "65 bits in all"],
    ]
    assert "one half" not in text
    assert made(VALUES.clamp(max=1), P_KEPT).to_html().count('"totals":[]') == 2
    (section,) = profile_sections(made())
    totals, _, losses = section.parts
    assert isinstance(totals, Bars)
    assert [bar.name for bar in totals.rows] == ["depth 2", "depth 1", "depth 0"]
    assert [bar.value for bar in totals.rows] == ["47.5 ± 24.7", "76 ± 48.1", "65 ± 49.5"]
    assert isinstance(losses, Bars)
    assert [round(bar.length, 3) for bar in losses.rows] == [1.0, -0.386]
    assert bars_of(made(depths=(0, 1, 1)).to_html()) == []
    assert bars_of(made().to_html(sections=[])) == []


def test_a_score_that_is_no_number_has_no_bar() -> None:
    broken = made()
    broken.columns["score"][(broken["depth"] == 1) & (broken["label"] == "dull")] = np.nan
    (section,) = profile_sections(broken)
    totals, _, losses = section.parts
    assert isinstance(totals, Bars)
    assert [(bar.value, round(bar.length, 3)) for bar in totals.rows] == [
        ("47.5 ± 24.7", 0.731),
        ("nan", 0.0),
        ("65 ± 49.5", 1.0),
    ]
    assert isinstance(losses, Bars)
    assert [bar.length for bar in losses.rows] == [0.0, 0.0]
    assert len(broken.plot(kind="profile", example=1).axes[1].texts) == 2


def test_the_report_has_the_profile_and_no_fractions() -> None:
    text = maskhooks.report(explanation=[made(), made(first=2)], min_count=1)
    assert bars_of(text) == [
        "What this is about",
        "Information at each depth",
        "By kind of token",
        "By token",
        "By prediction",
        "Examples",
    ]
    assert not re.search(r"\d%[^\"]", text.split("</style>")[1].replace("width:", ""))
    assert "one half" not in text
    assert ">18.6<" not in text
    assert "information in bits, at each depth, the deepest at the top" in text
    alone = maskhooks.report(explanation=made().select(depth=0), min_count=1)
    assert "Scores at each depth" in bars_of(alone)
