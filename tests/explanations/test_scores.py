"""Scores of a site as rows: positions, heads, patches, channels and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskhooks.errors import BatchError, PatternError
from maskhooks.explanations.explanation import Explanation
from maskhooks.explanations.scores import FIXED, Scores, stack
from maskhooks.sites.site import Site


def scores(pattern: str, values: torch.Tensor, valid: torch.Tensor | None = None, **settings: object) -> Scores:
    site = Site.parse("net.layer:output", pattern)
    if valid is None:
        sizes = dict(zip(site.gating().gated, values.shape, strict=True))
        valid = torch.ones([sizes[axis] for axis in site.gating().positions], dtype=torch.bool)
    return Scores(site, 3, values, valid, **settings)  # type: ignore[arg-type]


def test_tokens_are_rows_in_the_order_of_the_mask() -> None:
    valid = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.tensor([[0.5, 0.6, 0.0], [1.0, 0.2, 0.3]], dtype=torch.bfloat16, requires_grad=True)
    rows = scores("batch token hidden -> batch token", values, valid, names=[["a", "b"], ["c", "d", "e"]]).rows(
        start_index=10
    )
    assert list(rows) == list(FIXED)
    assert rows["example"].tolist() == [10, 10, 10, 11, 11, 11]
    assert rows["position"].tolist() == [0, 1, 2, 0, 1, 2]
    assert rows["depth"].tolist() == [3] * 6
    assert rows["label"].tolist() == ["a", "b", "2", "c", "d", "e"]
    assert rows["valid"].tolist() == [True, True, False, True, True, True]
    assert rows["score"].dtype == np.float32
    np.testing.assert_array_equal(rows["score"], values.detach().float().reshape(-1).numpy())
    assert rows["kept"].tolist() == [False, True, False, True, False, False]  # .5 is not above .5


def test_the_threshold_moves_kept() -> None:
    part = scores("batch token hidden -> batch token", torch.tensor([[0.1, 0.4, 0.9]]))
    assert part.rows(threshold=0.3)["kept"].tolist() == [False, True, True]


def test_heads_are_a_column_and_share_the_tokens_padding() -> None:
    values = torch.rand(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    rows = scores("batch token (head dim) -> batch token head, head=4", values, valid).rows()
    for example, token, head, is_real, score in zip(
        *(rows[n].tolist() for n in ("example", "position", "head", "valid", "score")), strict=True
    ):
        assert is_real == valid[example, token]
        assert score == pytest.approx(values[example, token, head].item())


def test_position_is_the_position_axis_where_heads_come_first() -> None:
    values = torch.rand(2, 4, 3)
    rows = scores("batch (head dim) token -> batch head token, head=4", values, names=[list("xyz"), list("uvw")]).rows()
    assert rows["position"].max() == 2
    assert rows["head"].max() == 3
    assert rows["label"].tolist() == list("xyz") * 4 + list("uvw") * 4


@pytest.mark.parametrize("axes", ["height width", "row column"])
def test_patches_have_row_and_column(axes: str) -> None:
    rows = scores(f"batch channel {axes} -> batch {axes}", torch.rand(2, 3, 5)).rows()
    assert rows["position"].reshape(2, 3, 5)[1].tolist() == np.arange(15).reshape(3, 5).tolist()
    np.testing.assert_array_equal(rows["position"], rows["row"] * 5 + rows["column"])
    assert rows["label"][:16].tolist() == [*(f"({row}, {column})" for row in range(3) for column in range(5)), "(0, 0)"]


def test_channels_beside_patches_are_a_column() -> None:
    rows = scores("batch channel height width -> batch channel height width", torch.rand(1, 2, 3, 5)).rows()
    assert rows["channel"].reshape(2, 15).tolist() == [[0] * 15, [1] * 15]
    assert rows["position"].reshape(2, 15)[1].tolist() == list(range(15))


def test_an_image_needs_both_of_its_axes() -> None:
    made = scores("batch token column -> batch token column", torch.rand(1, 4, 3))
    assert made.rows()["column_index"].tolist() == [0, 1, 2] * 4
    assert Explanation.build([made], provenance={}).matrix()[0].shape == (1, 4)


def test_an_axis_named_like_a_column_is_renamed() -> None:
    rows = scores("batch place depth -> batch place depth", torch.rand(1, 2, 3)).rows()
    assert rows["depth"].tolist() == [3] * 6
    assert rows["depth_index"].tolist() == [0, 1, 2, 0, 1, 2]


def test_a_value_gated_as_a_whole_has_position_0() -> None:
    rows = scores("batch hidden -> batch", torch.tensor([0.2, 0.8]), names=[["many", "tokens"]] * 2).rows()
    assert rows["position"].tolist() == [0, 0]
    assert rows["label"].tolist() == ["0", "0"]


def test_what_does_not_fit_is_named() -> None:
    pattern = "batch token hidden -> batch token"
    with pytest.raises(PatternError, match=r"net\.layer:output: scores have shape \[2\]"):
        Scores(Site.parse("net.layer:output", pattern), 0, torch.rand(2), torch.ones(2, 1).bool()).rows()
    with pytest.raises(BatchError, match=r"shape \[2, 2\].*\[2, 3\]"):
        scores(pattern, torch.rand(2, 3), torch.ones(2, 2, dtype=torch.bool)).rows()
    with pytest.raises(BatchError, match="names for 1 examples"):
        scores(pattern, torch.rand(2, 3), names=[["a"]]).rows()
    with pytest.raises(BatchError, match="up to 4 positions"):
        scores(pattern, torch.rand(2, 3), names=[["a"], list("abcd")]).rows()
    with pytest.raises(PatternError, match="has no pattern"):
        Scores(Site.parse("net.layer:output"), 0, torch.rand(2, 3), torch.ones(2, 3).bool()).rows()


def test_stack_renumbers_sites_and_fills_axes_that_are_missing() -> None:
    tokens = scores("batch token hidden -> batch token", torch.rand(1, 2)).rows()
    heads = scores("batch token (head dim) -> batch token head, head=2", torch.rand(1, 1, 2)).rows()
    columns, sites = stack([(tokens, ["b", "unused"]), (heads, ["a"]), (tokens, ["b"])])
    assert sites == ("b", "a")
    assert columns["site"].tolist() == [0, 0, 1, 1, 0, 0]
    assert columns["head"].tolist() == [-1, -1, 0, 1, -1, -1]
    assert columns["head"].dtype == np.int32
