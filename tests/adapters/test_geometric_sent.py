"""What a layer sent, as tensors with names and as the rows of a place."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_geometric")

from maskhooks_geometric.sent import Sent

ROWS = torch.tensor([[0, 1, -1, 0, 4], [1, 2, 0, 0, 4], [2, 3, 1, 1, 4]])


def test_rows_have_the_attributes_in_their_order() -> None:
    sent = Sent.of(ROWS)
    assert len(sent) == 3
    assert sent.relation.tolist() == [-1, 0, 1]
    assert torch.equal(sent.rows(), ROWS)
    assert torch.equal(sent[sent.relation >= 0].rows(), ROWS[1:])
    assert torch.equal(sent[:-1].rows(), ROWS[:-1])


def test_ends_are_as_the_layer_was_given_them() -> None:
    assert Sent.of(ROWS).ends.tolist() == [[0, 1], [1, 2], [3, 2]]


def test_lists_of_edges_are_told_apart_where_there_are_several() -> None:
    assert Sent.of(ROWS).portions() == [None]
    assert Sent.of(ROWS).within(None).all()
    several = Sent.of(torch.cat([ROWS, torch.tensor([[0], [2], [0]])], 1))
    assert several.portions() == [0, 2]
    assert several.within(0).tolist() == [True, False, True]
    assert torch.equal(several[several.within(2)].rows()[:, :5], ROWS[1:2])
