"""Taps on graph networks: nested, copied, refused on compiled models, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.nn import GCNConv

import maskhooks
from maskhooks.checks.doctor import doctor
from maskhooks.errors import CompiledModelError, ReplacementError, SiteNeverFiredError, TappedModelError
from maskhooks.sites.site import Site
from tests.adapters.geometric_models import EDGES, Pooled, batch, graph, randn
from tests.adapters.geometric_values import values

Unchanged = Callable[[nn.Module], nn.Module]


def test_nothing_is_left_behind(unchanged: Unchanged) -> None:
    model = unchanged(Pooled())
    hooked, data = maskhooks.wrap(model), graph()
    with pytest.raises(RuntimeError, match="mine"), hooked.tap(replace={"message": torch.clone}):
        raise RuntimeError("mine")

    def broken(value: Tensor) -> Tensor:
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"), hooked.tap(replace={"first.message:output": broken}):
        hooked(data)
    with hooked.tap(read="message"):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TappedModelError, match="tapped"):
                copied(model)
        hooked(data)
    copy.deepcopy(model)
    pickle.dumps(model)


def test_a_cache_of_normalised_edges_is_as_it_was(unchanged: Unchanged) -> None:
    model = unchanged(GCNConv(3, 4, cached=True))
    hooked = maskhooks.wrap(model)
    values(hooked, (randn(5, 3), EDGES), "message:output")
    assert model._cached_edge_index is None


def test_taps_nest() -> None:
    hooked, data = maskhooks.wrap(Pooled()), graph()
    site = "first.message:output"
    with torch.no_grad(), hooked.tap(replace={site: torch.zeros_like}), hooked.tap(read=site) as inner:
        hooked(data)
        assert not inner.values[site].any()
    with torch.no_grad(), hooked.tap(read=site) as tap:
        hooked(data)
        assert tap.values[site].any()


def test_copies_of_a_hooked_have_messages() -> None:
    twin = copy.deepcopy(maskhooks.wrap(Pooled()))
    assert len(values(twin, graph(), "first.message:output")[0]) == 11


def test_what_is_only_read_is_not_replaced() -> None:
    hooked = maskhooks.wrap(Pooled())
    with (
        pytest.raises(ReplacementError, match="can only be read"),
        hooked.tap(replace={"first.source:output": torch.zeros_like}),
    ):
        hooked(graph())


def test_the_doctor_knows_messages() -> None:
    report = doctor(maskhooks.wrap(Pooled()), batch())
    assert report.healthy
    rows = {row["site"]: row for row in report.rows()}
    assert rows["first.source:output"]["bypassed"] == "only read"
    assert rows["first.message:output"]["trouble"] == ""
    assert not any(row["foreign hooks"] for row in rows.values())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_models_are_refused() -> None:
    compiled = torch.compile(Pooled(), backend="eager")
    with pytest.raises(CompiledModelError, match="_orig_mod"):
        maskhooks.wrap(compiled)
    model = Pooled()
    hooked, later = maskhooks.wrap(model), torch.compile(model, backend="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's, of a compiled module under a tap
        with pytest.raises(SiteNeverFiredError, match=r"first\.message"), hooked.tap(read="message"):
            later(graph().x, EDGES)
    part = Pooled()
    part.first.compile(backend="eager")
    with pytest.raises(CompiledModelError, match="first"):
        maskhooks.wrap(part)


def test_sites_are_parsed() -> None:
    hooked = maskhooks.wrap(Pooled())
    for site in hooked.sites:
        assert str(Site.parse(str(site))) == str(site)
