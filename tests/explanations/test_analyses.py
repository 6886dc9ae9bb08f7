"""Analyses, against plain loops over rows."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from maskhooks.errors import SettingError
from maskhooks.explanations.analyses import depths_kept, kept_by, plot_depths, seed_deviation, token_kind, top_groups
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.shards import Shards
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.site import Site
from tests.fresh_process import printed_by

PATTERN = "batch token hidden -> batch token"
WORDS = [["[CLS]", "un", "##happy", "film", ".", "[SEP]"], ["[CLS]", "good", "[SEP]"], ["[CLS]", "7", "films", "[SEP]"]]
REAL = torch.arange(6) < torch.tensor([[6], [3], [4]])


def explanation(seed: int = 0, depths: int = 3, first: int = 0, site: str = "layer.{}:output") -> Explanation:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(depths, 3, 6, generator=generator).where(REAL, 1.0)  # padding would win, if it counted
    parts = [Scores(Site.parse(site.format(d), PATTERN), d, part, REAL, WORDS) for d, part in enumerate(scores)]
    known = [{"target": name} for name in ("bad", "good", "bad")]
    return Explanation.build(parts, provenance={"seed": seed}, metadata=known, start_index=first)


def heads(values: torch.Tensor) -> Explanation:
    site = Site.parse("attention:output", "batch token (head dim) -> batch token head, head=2")
    valid = torch.ones(values.shape[:2], dtype=torch.bool)
    return Explanation.build([Scores(site, 0, values, valid, [["a", "b"]] * len(values))], provenance={})


def test_kept_by_is_the_mean_over_the_rows_of_a_group() -> None:
    whole = explanation()
    found = kept_by(whole, token_kind)
    frame = whole.to_pandas()
    frame = frame[frame["valid"]].assign(kind=lambda rows: rows["label"].map(token_kind))
    expected = frame.groupby(["depth", "kind"])
    assert len(found) == expected.ngroups == 3 * 5
    for row in found:
        rows = expected.get_group((row.depth, row.group))
        assert row.site == f"layer.{row.depth}:output"
        assert row.score == pytest.approx(rows["score"].mean())
        assert row.kept == pytest.approx(rows["kept"].mean())
        assert (row.positions, row.examples) == (len(rows), rows["example"].nunique())
    assert [row.depth for row in found] == sorted(row.depth for row in found)
    min_logit = [row.score for row in found if row.depth == 0]
    assert min_logit == sorted(min_logit, reverse=True)


def test_rows_make_a_table() -> None:
    frame = pd.DataFrame(kept_by(explanation(), "target"))
    assert list(frame.columns) == ["site", "depth", "group", "score", "kept", "positions", "examples"]
    assert frame.query("depth == 0").set_index("group")["positions"].to_dict() == {"bad": 10, "good": 3}


def test_rare_groups_can_be_left_out() -> None:
    assert {row.group for row in kept_by(explanation(), "label", min_count=3)} == {"[CLS]", "[SEP]"}
    assert {row.group for row in depths_kept(explanation(), "label", min_count=2)} == {"[CLS]", "[SEP]"}
    assert depths_kept(explanation(), "label", min_count=4) == []


def test_parts_count_like_the_whole() -> None:
    parts = [explanation(seed, first=3 * seed) for seed in range(3)]
    whole = Explanation.concat(parts)
    for group in ("label", token_kind, "target", WORDS * 3):
        for analyse in (kept_by, depths_kept):
            found, expected = pd.DataFrame(analyse(iter(parts), group)), pd.DataFrame(analyse(whole, group))
            pd.testing.assert_frame_equal(found, expected)
    without_rows = whole.select(example=0, valid=False)
    assert depths_kept([without_rows, whole], "label") == depths_kept(whole, "label")


def test_files_of_any_number_are_parts(tmp_path: Path) -> None:
    parts = [explanation(seed, first=3 * seed) for seed in range(3)]
    shards = Shards.open(tmp_path / "explained", {})
    for number, part in enumerate(parts):
        shards.write(number, part)
    assert depths_kept(Shards(tmp_path / "explained"), "target") == depths_kept(Explanation.concat(parts), "target")


def test_depths_kept_counts_depths_a_position() -> None:
    whole = explanation()
    found = {row.group: row for row in depths_kept(whole, "label")}
    rows = whole.to_pandas().query("valid")
    counts = rows.groupby(["label", "example", "position"], observed=True)["kept"].sum()
    for label, row in found.items():
        assert row.depths == pytest.approx(counts[label].mean())
        assert row.fraction == pytest.approx(counts[label].mean() / 3)
        assert (row.positions, row.examples) == (len(counts[label]), counts[label].index.unique("example").size)
    depths = [row.depths for row in depths_kept(whole, "label")]
    assert depths == sorted(depths, reverse=True)


def test_the_error_takes_examples_for_the_unit() -> None:
    counts = torch.tensor([0.0, 1.0, 3.0, 3.0])
    scores = (torch.arange(3)[:, None] < counts)[:, :, None].float()  # [depth, example, position]
    valid = torch.ones(4, 1, dtype=torch.bool)

    def found(repeat: int) -> tuple[float, float]:
        parts = [
            Scores(Site.parse(f"layer.{d}:output", PATTERN), d, part.expand(4, repeat), valid.expand(4, repeat))
            for d, part in enumerate(scores)
        ]
        (row,) = depths_kept(Explanation.build(parts, provenance={}), lambda _: "all")
        assert row.positions == 4 * repeat
        return row.depths, row.standard_error

    assert found(1) == pytest.approx((counts.mean().item(), counts.std().item() / 2))
    assert found(7) == pytest.approx(found(1))  # repeating each position in its example is no new evidence
    (alone,) = depths_kept(explanation().select(example=1), lambda _: "all")
    assert math.isnan(alone.standard_error)


def test_groups_that_change_with_depth_share_out_the_depths() -> None:
    whole = explanation()
    found = {row.group: row for row in depths_kept(whole, "depth")}
    for (_, depth), mean in {pair: np.mean(whole.select(depth=pair[1])["kept"]) for pair in whole.mean_kept()}.items():
        assert found[str(depth)].depths == found[str(depth)].fraction == pytest.approx(mean)


def test_heads_are_averaged_in_depths_and_counted_in_rows() -> None:
    one = heads(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    assert {row.group: (row.depths, row.fraction, row.positions) for row in depths_kept(one, "label")} == {
        "a": (0.5, 0.5, 1),
        "b": (1.0, 1.0, 1),
    }
    assert {row.group: row.positions for row in kept_by(one, "label")} == {"a": 2, "b": 2}
    assert top_groups(heads(torch.tensor([[[1.0, 0.0], [0.6, 0.6]]]))) == {"b": 1.0}


def test_several_sites_of_one_depth_are_several_depths_kept() -> None:
    both = Explanation.concat([explanation(), explanation(1, site="other.{}:output")])
    one, other = (
        {row.group: row.depths for row in depths_kept(part, "label")}
        for part in (explanation(), explanation(1, site="other.{}:output"))
    )
    for row in depths_kept(both, "label"):
        assert row.depths == pytest.approx(one[row.group] + other[row.group])
        assert row.fraction == pytest.approx(row.depths / 6)
    assert len({(row.site, row.depth) for row in kept_by(both, "label")}) == 6


def test_top_is_where_the_largest_real_score_is() -> None:
    whole = explanation()
    for depth in (None, 0, 1):
        rows = whole.select(depth=2 if depth is None else depth).to_pandas()
        best = rows.loc[rows.groupby("example")["score"].idxmax()]
        expected = best["label"].value_counts(normalize=True).to_dict()
        assert top_groups(whole, depth=depth) == pytest.approx(expected)
        assert top_groups(whole, "position", depth=depth) == pytest.approx(
            best["position"].astype(str).value_counts(normalize=True).to_dict()
        )
    shares = list(top_groups(whole).values())
    assert shares == sorted(shares, reverse=True)


def test_top_tells_types_of_edges_apart() -> None:
    numbers, valid, whose = (
        torch.arange(2),
        torch.ones(2, dtype=torch.bool),
        ExampleIndex(torch.zeros(2, dtype=torch.long), 1),
    )
    parts = [
        Scores(
            Site.parse(f"conv.{relation}:output", "edge feature -> edge"),
            0,
            torch.tensor(values),
            valid,
            example_index=whose,
            edges={"source": numbers, "target": numbers + 5 * relation, "relation": torch.full((2,), relation)},
        )
        for relation, values in enumerate(([0.1, 0.9], [0.8, 0.0]))
    ]
    assert top_groups(Explanation.build(parts, provenance={})) == {"1→1": 1.0}


def test_equal_scores_share_an_example() -> None:
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.5, 0.4]])
    names = [["[CLS]", "a", "b"], ["[CLS]", "a", "b"]]
    valid = torch.ones(2, 3, dtype=torch.bool)
    one = Explanation.build([Scores(Site.parse("x:output", PATTERN), 0, scores, valid, names)], provenance={})
    assert top_groups(one) == {"a": 0.75, "[CLS]": 0.25}
    assert top_groups(one, {"[CLS]": "special"}) == {
        "special": 0.25
    }  # words take part, their share is not in the result


def test_stability_is_the_mean_deviation_over_seeds() -> None:
    seeds = [explanation(seed) for seed in range(4)]
    found = seed_deviation(seeds)
    scores = np.stack([one.select()["score"] for one in seeds])
    expected = scores.std(axis=0, ddof=1)
    depth = seeds[0].select()["depth"]
    assert [(row.site, row.depth) for row in found[:-1]] == list(seeds[0].mean_kept())
    for row in found[:-1]:
        assert row.deviation == pytest.approx(expected[depth == row.depth].mean(), rel=1e-5)
        assert row.positions == 13
    assert found[-1].site is found[-1].depth is None
    assert found[-1].deviation == pytest.approx(expected.mean(), rel=1e-5)
    assert seed_deviation([seeds[0], seeds[0]])[-1].deviation == 0


def test_stability_does_not_depend_on_the_order_of_rows() -> None:
    one, other = (Explanation.concat([explanation(seed), explanation(seed + 9, first=3)]) for seed in (0, 1))
    turned = Explanation.concat(
        [explanation(10, first=3), *(explanation(1).select(depth=d, valid=None) for d in (2, 0, 1))]
    )
    assert turned != other
    assert seed_deviation([one, turned]) == seed_deviation([one, other])


def test_stability_refuses_what_differs() -> None:
    one = explanation()
    with pytest.raises(SettingError, match="at least two explanations, got 1"):
        seed_deviation([one])
    for other, message in [
        (explanation(first=1), "1 differ in examples"),
        (explanation(depths=2), r"differ in sites \(layer.0"),
        (one.select(example=[0, 1]), "differ in examples"),
        (explanation(site="other.{}:output"), "differ in sites"),
        (heads(torch.rand(3, 2, 2)), "differ in sites"),
    ]:
        with pytest.raises(SettingError, match=message):
            seed_deviation([one, other])
    renamed = explanation()
    renamed.columns["label"] = np.array([f"{label}!" for label in renamed["label"]], dtype=object)
    with pytest.raises(SettingError, match="0 and 2 differ in the column 'label'"):
        seed_deviation([one, one, renamed])


def test_nothing_to_count_is_an_error_with_a_way_out() -> None:
    empty = explanation().select(example=1, valid=False)
    for analyse in (kept_by, depths_kept, top_groups):
        for part, group in ((explanation(), {"nothing": "here"}), (empty, "label")):
            with pytest.raises(SettingError, match="no valid position is in any group"):
                analyse(part, group)  # type: ignore[operator]
    with pytest.raises(SettingError, match="no valid position"):
        seed_deviation([empty, empty])
    with pytest.raises(SettingError, match=r"no depth 7\. The explanation holds 0, 1, 2"):
        top_groups(explanation(), depth=7)


def test_a_million_rows_cost_less_than_a_second() -> None:
    names = [[f"w{i % 1000}" for i in range(row, row + 50)] for row in range(2500)]
    valid = torch.ones(2500, 50, dtype=torch.bool)
    parts = [Scores(Site.parse(f"l.{d}:output", PATTERN), d, torch.rand(2500, 50), valid, names) for d in range(8)]
    large = Explanation.build(parts, provenance={})
    assert len(large) == 1_000_000
    kept_by(large.select(example=0), token_kind)  # pandas is imported
    for analyse in (lambda: kept_by(large, token_kind), lambda: depths_kept(large, "label"), lambda: top_groups(large)):
        start = time.process_time()
        analyse()
        assert time.process_time() - start < 1


def test_import_is_light() -> None:
    code = (
        "import sys, maskhooks.explanations.analyses\n"
        "print({'pandas', 'pyarrow', 'matplotlib', 'jinja2', 'transformers'} & set(sys.modules))\n"
    )
    assert printed_by(code) == "set()"


def test_plot_has_a_bar_for_each_group() -> None:
    rows = depths_kept(explanation(), "label")
    axes = plot_depths(rows).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([row.depths for row in rows])
    assert axes.get_yticklabels()[0].get_text() == f"{rows[0].group}  ({rows[0].positions})"
