"""What rows come to, against plain numbers."""

from __future__ import annotations

import pytest
import torch

from maskhooks.explanations.analyses import kept_by
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.score_labels import ATTRIBUTION, BITS
from maskhooks.reports.findings import by_depth, by_group, by_kind, by_label, kind_of
from maskhooks.sites.site import Site
from maskhooks.viz.sections import Bars, Grid, Section

WORDS = [["[CLS]", "good", "film", "!"], ["[CLS]", "bad"]]
REAL = torch.tensor([[True, True, True, True], [True, True, False, False]])
VALUES = torch.tensor([[[1.0, 1.0, 0.2, 0.6], [1.0, 0.8, 1.0, 1.0]], [[0.0, 0.9, 0.1, 0.2], [0.6, 0.4, 1.0, 1.0]]])


def explained(known: tuple[str, str] = ("positive", "negative"), copies: int = 2) -> Explanation:
    sites = [Site.parse(f"layer.{depth}:output", "batch token hidden -> batch token") for depth in range(2)]
    parts = [
        Explanation.build(
            [Scores(site, depth, VALUES[depth], REAL, WORDS) for depth, site in enumerate(sites)],
            provenance={},
            metadata=[{"prediction": name, "target": str(copy)} for name in known],
            start_index=2 * copy,
        )
        for copy in range(copies)
    ]
    return Explanation.concat(parts)


def part(section: Section | None) -> Bars | Grid:
    assert section is not None
    (found,) = section.parts
    assert isinstance(found, (Bars, Grid))
    return found


def kinds(explanation: Explanation) -> Section | None:
    return by_kind(kept_by(explanation, kind_of(explanation["label"])))


def test_by_depth_is_the_mean_over_all_positions() -> None:
    bars = part(by_depth(kept_by(explained(), kind_of(["[CLS]"]))))
    assert isinstance(bars, Bars)
    assert [(bar.name, bar.note) for bar in bars.rows] == [("depth 1", "layer.1:output"), ("depth 0", "layer.0:output")]
    assert bars.rows[0].length == pytest.approx((0.0 + 0.9 + 0.1 + 0.2 + 0.6 + 0.4) / 6)
    assert bars.rows[1].length == pytest.approx((1.0 + 1.0 + 0.2 + 0.6 + 1.0 + 0.8) / 6)
    assert [bar.value for bar in bars.rows] == ["36.7%  (33.3%)", "76.7%  (83.3%)"]


def test_by_kind_has_the_kinds_that_occur() -> None:
    grid = part(kinds(explained()))
    assert isinstance(grid, Grid)
    assert grid.columns == [("special", "4 examples"), ("punctuation", "2 examples"), ("word", "4 examples")]
    assert list(grid.rows) == ["depth 1", "depth 0"]
    scores = [[cell.score for cell in line] for line in grid.cells]
    assert scores[0] == pytest.approx([0.3, 0.2, (0.9 + 0.1 + 0.4) / 3])
    assert scores[1] == pytest.approx([1.0, 0.6, (1.0 + 0.2 + 0.8) / 3])
    assert grid.cells[0][2].text == "word, depth 1: 46.7% kept on average over 6 positions of 4 examples"


def test_one_kind_or_one_class_makes_no_picture() -> None:
    words = explained().select()
    assert by_kind(kept_by(words, lambda label: "word")) is None
    assert by_group([explained(("same", "same"))], ["prediction"]) is None
    assert by_group([explained(copies=1)], ["prediction"]) is None  # each prediction only once


def test_marks_of_words_say_what_continues_one() -> None:
    assert kind_of(["Ġa", "b"])("b") == kind_of(["▁a"])("b") == "continuation"
    assert kind_of(["a", "b"])("b") == "word"


def test_by_group_has_the_classes_by_size() -> None:
    both = by_group([explained(copies=1), explained(copies=3).select(example=[2, 3, 4])], ["prediction", "target"])
    assert both is not None
    first, second = both.parts
    assert isinstance(first, Grid)
    assert isinstance(second, Grid)
    assert both.title == "By prediction and by target"
    assert first.columns == [("positive", "3 examples"), ("negative", "2 examples")]
    assert first.cells[0][0].score == pytest.approx((0.0 + 0.9 + 0.1 + 0.2) / 4)
    assert second.columns == [("0", "2 examples"), ("1", "2 examples")]  # "2" stands alone
    alone = by_group([explained(("same", "same"))], ["prediction", "target"])
    assert alone is not None
    assert alone.title == "By target"


def test_by_label_has_a_bar_for_each_frequent_token() -> None:
    bars = part(by_label([explained()], 4, 2))
    assert isinstance(bars, Bars)
    assert [(bar.name, bar.length, bar.note) for bar in bars.rows] == [("[CLS]", 0.75, "4 times")]
    bars = part(by_label([explained()], 1, 2))
    assert [bar.name for bar in bars.rows] == ["good", "[CLS]", "!", "bad", "film"]  # type: ignore[union-attr]
    assert by_label([explained()], 5, 2).text == "No token occurs 5 times."


def test_by_label_shows_both_ends_of_many_tokens() -> None:
    site = Site.parse("layer:output", "batch token hidden -> batch token")
    names = [[f"w{index:02}" for index in range(38)] + [" ", "\n"]]
    scores = Scores(site, 0, torch.linspace(1, 0, 40)[None], torch.ones(1, 40, dtype=torch.bool), names)
    most, least = by_label([Explanation.build([scores], provenance={})], 1, 1).parts
    assert isinstance(most, Bars)
    assert isinstance(least, Bars)
    assert [bar.name for bar in most.rows] == [f"w{index:02}" for index in range(15)]
    assert len(least.rows) == 15
    assert (most.rows[0].value, most.caption, least.caption) == ("1.00", "kept most", "kept least")


def test_scores_without_an_end_are_shown_as_they_are() -> None:
    """Bits have no half and no per cent; bars and shades end at the largest mean."""
    rows = explained()
    rows.columns["score"] *= 2000
    kinds = kept_by(rows, kind_of(["[CLS]"]))
    bars, grid = part(by_depth(kinds, BITS)), part(by_kind(kinds, BITS))
    assert isinstance(bars, Bars)
    assert [(bar.value, round(bar.length, 3)) for bar in bars.rows] == [("733", 0.478), ("1,533", 1.0)]
    assert isinstance(grid, Grid)
    assert [cell.value for cell in grid.cells[0]] == ["600", "400", "933"]
    assert [cell.score for cell in grid.cells[0]] == pytest.approx([0.3, 0.2, 1.4 / 3])
    assert grid.cells[0][2].text == f"word, depth 1: mean {BITS} 933 over 6 positions of 4 examples"
    tokens = by_label([rows], 4, 2, BITS)
    assert [(bar.name, bar.value, bar.note) for bar in part(tokens).rows] == [("[CLS]", "1,300", "4 times")]  # type: ignore[union-attr]
    assert tokens.text.startswith(f"The mean score of a token, {BITS}, over its occurrences and the 2 depths. Tokens")
    assert not [text for text in (by_depth(kinds, BITS).text, tokens.text) if "half" in text]


def test_attributions_below_0_are_red() -> None:
    rows = explained()
    rows.columns["score"] = rows.columns["score"] * 4 - 3
    bars, grid = part(by_depth(kept_by(rows, "position"), ATTRIBUTION)), part(kinds_of(rows))
    assert [bar.value for bar in bars.rows] == ["-1.53", "0.0667"]  # type: ignore[union-attr]
    assert [round(bar.length, 3) for bar in bars.rows] == [-1.0, 0.043]  # type: ignore[union-attr]
    assert isinstance(grid, Grid)
    assert min(cell.score or 0 for line in grid.cells for cell in line) == -1


def kinds_of(explanation: Explanation) -> Section | None:
    return by_kind(kept_by(explanation, kind_of(explanation["label"])), ATTRIBUTION)


def test_scores_that_are_not_a_number_have_no_colour() -> None:
    broken = explained()
    broken.columns["score"][broken["label"] == "!"] = float("nan")
    grid, bars = part(kinds(broken)), part(by_depth(kept_by(broken, kind_of([]))))
    assert isinstance(grid, Grid)
    assert [cell.score is None for cell in grid.cells[0]] == [False, True, False]
    assert [bar.length for bar in bars.rows] == [0, 0]  # type: ignore[union-attr]
