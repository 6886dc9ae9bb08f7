"""Layers whose positions are not the same: patches beside a class token, coarser maps, an encoder and a decoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.site import Site

MAP = "batch channel height width -> batch height width"
STATE = "batch patch hidden -> batch patch"
HEADS = "batch patch (head dim) -> batch patch head, head=2"
NAMES = ["[CLS]", *(f"({row}, {column})" for row in range(2) for column in range(4))]


def scores(depth: int, pattern: str, values: Tensor, names: list[str] | None = None) -> Scores:
    valid = torch.ones(values.shape[:2] if pattern == HEADS else values.shape, dtype=torch.bool)
    return Scores(Site.parse(f"layer{depth}:output", pattern), depth, values, valid, names and [names])


def test_patches_of_a_state_stand_where_those_of_the_input_do() -> None:
    image, state = torch.rand(1, 2, 4), torch.rand(1, 9)
    parts = [scores(0, MAP, image), scores(1, STATE, state, NAMES)]
    explanation = Explanation.build(parts, provenance={})
    drawn, _, names = explanation.matrix()
    assert names == [*NAMES[1:], "[CLS]"]
    assert np.array_equal(drawn[0], [*image.flatten().tolist(), np.nan], equal_nan=True)
    assert np.array_equal(drawn[1], [*state[0, 1:].tolist(), state[0, 0].item()])
    rows = explanation.select(depth=1)
    assert rows["row"].tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert rows["column"].tolist() == [-1, 0, 1, 2, 3, 0, 1, 2, 3]
    images = explanation._layers().images()
    assert np.array_equal(images[1], state[0, 1:].reshape(2, 4).numpy())
    assert len(explanation.plot().axes) == 3  # an image for each depth, and the colours


def test_a_coarser_map_fills_the_patches_that_it_covers() -> None:
    fine, coarse = torch.rand(1, 4, 6), torch.rand(1, 2, 3)
    explanation = Explanation.build([scores(0, MAP, fine), scores(1, MAP, coarse)], provenance={})
    images = explanation._layers().images()
    assert np.array_equal(images[0], fine[0].numpy())
    assert np.array_equal(images[1], coarse[0].repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())
    drawn, _, names = explanation.matrix()
    assert np.array_equal(drawn, images.reshape(2, -1))
    assert names[-1] == "(3, 5)"
    odd = Explanation.build([scores(0, MAP, torch.rand(1, 5, 5)), scores(1, MAP, torch.rand(1, 3, 3))], provenance={})
    assert np.isfinite(odd._layers().images()).all()


def test_positions_of_a_decoder_stand_beside_those_of_the_encoder() -> None:
    token, target = "batch token hidden -> batch token", "batch target hidden -> batch target"
    source, answer = torch.rand(1, 3), torch.rand(1, 2)
    parts = [
        scores(0, token, source, ["<s>", "the", "</s>"]),
        scores(1, token, 1 - source, ["<s>", "the", "</s>"]),
        scores(2, target, answer, ["</s>", "the"]),
    ]
    drawn, _, names = Explanation.build(parts, provenance={}).matrix()
    assert names == ["<s>", "the", "</s>", "</s>", "the"]
    assert np.isnan(drawn[:2, 3:]).all()
    assert np.isnan(drawn[2, :3]).all()
    assert drawn[2, 3:].tolist() == answer[0].tolist()


def edges(depth: int, relation: int, values: list[float], name: str = "") -> Scores:
    """Edges of a type, 0 -> 1, 1 -> 2 and so on."""
    rows = torch.arange(len(values))
    columns = {"source": rows, "target": rows + 1, "edge": rows, "relation": torch.full_like(rows, relation)}
    site = Site.parse(f"{name or relation}{depth}:output", "edge feature -> edge")
    valid, whose = torch.ones(len(values), dtype=torch.bool), ExampleIndex(torch.zeros_like(rows), 1)
    return Scores(site, depth, torch.tensor(values), valid, example_index=whose, edges=columns)


def test_sites_with_types_of_edges_of_their_own_are_one_layer() -> None:
    parts = [edges(0, 0, [0.1, 0.2]), edges(0, 1, [0.3, 0.4, 0.5]), edges(1, 1, [0.6, 0.7, 0.8])]
    explanation = Explanation.build(parts, provenance={})
    drawn, depths, names = explanation.matrix()
    assert depths == ["0", "1"]
    assert names == ["0→1", "1→2", "0→1", "1→2", "2→3"]
    expected = [[0.1, 0.2, 0.3, 0.4, 0.5], [np.nan, np.nan, 0.6, 0.7, 0.8]]
    assert np.allclose(drawn, expected, equal_nan=True)
    layers = explanation._layers()
    scores, ends, _, _ = layers.edges()
    assert ends[0].tolist() == [0, 0, 1, 1, 2]
    assert np.allclose(scores, [[0.1, 0.3, 0.2, 0.4, 0.5], [np.nan, 0.6, np.nan, 0.7, 0.8]], equal_nan=True)
    assert np.allclose(layers.means(), [0.3, 0.7])
    assert "0: 0.30, 1: 0.70" in repr(explanation)
    assert list(explanation.mean_kept()) == [("00:output", 0), ("10:output", 0), ("11:output", 1)]
    assert len(explanation.plot().axes) == 3  # two graphs, and the colours
    assert '"rows":["0","1"]' in explanation.to_html()


def test_sites_with_the_same_types_of_edges_are_several_layers() -> None:
    parts = [edges(0, 0, [0.1]), edges(0, 0, [0.2], "other"), edges(1, 0, [0.3]), edges(1, -1, [0.4], "unknown")]
    explanation = Explanation.build(parts, provenance={})
    _, depths, _ = explanation.matrix()
    assert depths == ["0 (00:output)", "0 (other0:output)", "1 (01:output)", "1 (unknown1:output)"]


def test_a_page_says_that_heads_are_averaged() -> None:
    heads = torch.rand(1, 9, 2)
    explanation = Explanation.build([scores(0, HEADS, heads, NAMES)], provenance={})
    assert "Scores are means over heads." in explanation.to_html()
    drawn, _, _ = explanation.matrix()
    assert np.allclose(drawn[0, -1], heads[0, 0].mean())
    assert '"patches":8' in explanation.to_html()
    assert "means over" not in Explanation.build([scores(0, MAP, torch.rand(1, 2, 4))], provenance={}).to_html()
