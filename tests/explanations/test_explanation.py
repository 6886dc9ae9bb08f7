"""An explanation's rows: what they hold, how they are chosen, put together, averaged and shown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from maskhooks.errors import BatchError, SettingError, UnknownSiteError
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.sites.site import Site
from tests.fresh_process import printed_by

TOKENS = [["[CLS]", "not", "bad", "[SEP]"], ["[CLS]", "good", "[SEP]"]]
REAL = torch.tensor([[True] * 4, [True] * 3 + [False]])


def tokens(address: str, depth: int, values: torch.Tensor) -> Scores:
    return Scores(Site.parse(address, "batch token hidden -> batch token"), depth, values, REAL, TOKENS)


def values(depths: int = 3) -> torch.Tensor:
    return torch.rand(depths, 2, 4, generator=torch.Generator().manual_seed(0))


def built(depths: int = 3, address: str = "embed:output", **settings: Any) -> Explanation:
    settings = {
        "provenance": {"seed": 0, "parts": ("hard concrete", "learned")},
        "metadata": [{"prediction": "positive", "target": "positive"}, {"prediction": "positive"}],
        **settings,
    }
    return Explanation.build([tokens(address, depth, part) for depth, part in enumerate(values(depths))], **settings)


def patches(depths: int = 2) -> Explanation:
    site = Site.parse("conv:output", "batch channel height width -> batch height width")
    valid = torch.ones(1, 3, 5, dtype=torch.bool)
    return Explanation.build([Scores(site, d, torch.rand(1, 3, 5), valid) for d in range(depths)], provenance={})


def test_rows_hold_each_score_once() -> None:
    explanation = built()
    assert len(explanation) == 24
    assert explanation.sites == ("embed:output",)
    for row in explanation.to_pandas().itertuples():
        assert row.score == values()[row.depth, row.example, row.position]
        assert row.kept == (row.score > 0.5 and row.valid)
        assert row.valid == REAL[row.example, row.position]
        assert row.label == (TOKENS[row.example][row.position] if row.valid else str(row.position))


def test_rows_of_bert_cost_a_few_milliseconds() -> None:
    site = Site.parse("embed:output", "batch token hidden -> batch token")
    valid, names = torch.ones(32, 64, dtype=torch.bool), [[f"w{i}" for i in range(64)]] * 32
    parts = [Scores(site, depth, torch.rand(32, 64), valid, names) for depth in range(8)]
    seconds = []
    for _ in range(7):
        start = time.process_time()
        Explanation.build(parts, provenance={})
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.03


def test_provenance_and_examples_are_kept() -> None:
    explanation = built(start_index=5)
    assert explanation.provenance == {"seed": 0, "parts": ["hard concrete", "learned"]}
    assert explanation.metadata[6] == {"prediction": "positive"}
    assert sorted(set(explanation["example"])) == [5, 6]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"provenance": {"gate": object()}}, SettingError, "JSON"),
        ({"metadata": [{"prediction": "a"}]}, BatchError, "1 examples, but scores for 2"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        built(**settings)


def test_scores_are_needed_and_differ() -> None:
    with pytest.raises(SettingError, match="needs scores"):
        Explanation.build([], provenance={})
    with pytest.raises(SettingError, match="two scores have the same site and depth"):
        Explanation.build([tokens("a:output", 1, values()[0])] * 2, provenance={})


def test_columns_by_name() -> None:
    assert set(built()["site"]) == {"embed:output"}
    with pytest.raises(SettingError, match=r"no column 'scores'.*score"):
        built()["scores"]


def test_select_narrows_down() -> None:
    explanation = Explanation.build(
        [tokens(f"layer.{depth}:output", depth, part) for depth, part in enumerate(values())],
        provenance={},
        metadata=[{"target": "a"}, {"target": "b"}],
    )
    assert len(explanation.select()) == 21
    assert len(explanation.select(valid=None)) == 24
    assert explanation.select(valid=False)["position"].tolist() == [3, 3, 3]
    one = explanation.select(example=1, site="layer.2:output")
    np.testing.assert_array_equal(one["score"], values()[2, 1, :3].numpy())
    assert one.sites == ("layer.2:output",)
    assert one.metadata == {1: {"target": "b"}}
    two = explanation.select(depth=[0, 2], site=[Site.parse("layer.2:output"), "layer.1:output"])
    assert set(two["depth"]) == {2}
    with pytest.raises(UnknownSiteError, match="Did you mean") as caught:
        explanation.select(site="layer.7:output")
    assert "layer.2:output" in caught.value.near
    with pytest.raises(SettingError, match=r"no example 9\. The explanation holds 0, 1"):
        explanation.select(example=9)
    with pytest.raises(SettingError, match="no depth 5"):
        explanation.select(depth=[0, 5])


def test_concat_puts_batches_and_sites_together() -> None:
    first, second = built(), built(start_index=2)
    both = Explanation.concat([first, second])
    assert len(both) == 48
    assert both.provenance == first.provenance
    assert sorted(both.metadata) == [0, 1, 2, 3]
    assert both.select(example=[0, 1], valid=None) == first
    other = Explanation.concat([both, built(address="z:output", provenance={"seed": 1})])
    assert other.sites == ("embed:output", "z:output")
    assert other.provenance == {"of": [first.provenance, {"seed": 1}]}
    assert other.matrix(0)[1][:2] == ["0 (embed:output)", "0 (z:output)"]
    with pytest.raises(SettingError, match="start_index=32"):
        Explanation.concat([first, built()])
    with pytest.raises(SettingError, match="at least one"):
        Explanation.concat([])


def test_matrix_is_depth_by_position() -> None:
    scores, depths, labels = built().matrix(example=1)
    np.testing.assert_array_equal(scores, values()[:, 1, :3].numpy())
    assert depths == ["0", "1", "2"]
    assert labels == TOKENS[1]
    np.testing.assert_array_equal(built(start_index=4).matrix()[0], values()[:, 0].numpy())


def test_matrix_averages_heads_and_leaves_gaps() -> None:
    site = Site.parse("attention:output", "batch token (head dim) -> batch token head, head=3")
    heads = torch.rand(1, 4, 3)
    valid = torch.ones(1, 4, dtype=torch.bool)
    short = Site.parse("pooled:output", "batch hidden -> batch")
    explanation = Explanation.build(
        [Scores(site, 0, heads, valid), Scores(short, 1, torch.tensor([0.25]), torch.tensor([True]))],
        provenance={},
    )
    scores, _, labels = explanation.matrix()
    np.testing.assert_allclose(scores[0], heads.mean(-1)[0], rtol=1e-6)
    assert labels == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(scores[1], [0.25, np.nan, np.nan, np.nan])


def test_mean_kept_is_over_real_positions() -> None:
    means = built().mean_kept()
    assert list(means) == [("embed:output", depth) for depth in range(3)]
    for (_, depth), mean in means.items():
        assert mean == pytest.approx(values()[depth][REAL].mean().item(), rel=1e-6)


def test_repr_is_short() -> None:
    text = repr(built(2))
    assert text.startswith("Explanation(2 examples, 1 site, 16 rows; mean kept by depth: 0: 0.")
    assert len(repr(built(26))) < 200
    assert "..." in repr(built(26))


def test_repr_html_is_escaped() -> None:
    site = Site.parse("embed:output", "batch token hidden -> batch token")
    names = [["<img src=x onerror=alert(1)>", "&"]]
    explanation = Explanation.build([Scores(site, 0, torch.rand(1, 2), torch.ones(1, 2).bool(), names)], provenance={})
    text = explanation._repr_html_()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "<table" in built().select(valid=False)._repr_html_()


def test_pandas_has_categories() -> None:
    frame = built().to_pandas()
    assert isinstance(frame["site"].dtype, pd.CategoricalDtype)
    assert frame["score"].dtype == np.float32
    assert list(frame.columns)[:4] == ["example", "site", "depth", "position"]


def test_plot_chooses_the_kind() -> None:
    initial_temperature = built().plot(0)
    assert len(initial_temperature.axes[0].collections) == 1
    assert initial_temperature.axes[0].get_title(loc="left") == "example 0 · prediction: positive · target: positive"
    assert len(built(1).plot().axes[0].patches) == 4
    assert len(built(3).plot(kind="bars").axes[0].patches) == 12
    images = patches().plot()
    assert [len(axes.images) for axes in images.axes[:2]] == [1, 1]
    assert images.axes[0].images[0].get_array().shape == (3, 5)
    with pytest.raises(SettingError, match=r"no kind of picture 'pie'.*heatmap"):
        built().plot(kind="pie")
    with pytest.raises(SettingError, match="needs patches"):
        built().plot(kind="image")
    with pytest.raises(SettingError, match="no rows"):
        built().select(depth=0, example=0, valid=False).plot()


def test_plot_draws_on_axes_that_are_given() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(1, 2)
    assert built().plot(ax=axes[0]) is figure
    assert built().plot(kind="bars", ax=axes[1]) is figure
    with pytest.raises(SettingError, match="select"):
        patches().plot(ax=axes[0])
    assert patches(1).plot(ax=axes[0]) is figure


def test_import_and_plot_leave_pyplot_alone() -> None:
    code = (
        "import sys, torch\n"
        "from maskhooks.explanations.explanation import Explanation, Scores\n"
        "from maskhooks.sites.site import Site\n"
        "print({'pandas', 'pyarrow', 'matplotlib', 'jinja2'} & set(sys.modules))\n"
        "site = Site.parse('a:output', 'batch token hidden -> batch token')\n"
        "scores = Scores(site, 0, torch.rand(1, 2), torch.ones(1, 2).bool())\n"
        "print(Explanation.build([scores], provenance={}).plot()._repr_png_()[1:4])\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    assert printed_by(code).splitlines() == ["set()", "b'PNG'", "True False"]


def test_html_is_written_and_returned(tmp_path: Path) -> None:
    text = built().to_html(tmp_path / "page.html", title="A & B")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    assert "A &amp; B" in text
    assert "embed:output" in text
