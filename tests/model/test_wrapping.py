"""wrap: any module becomes a Hooked; what is wrong is named before anything changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import maskhooks
from maskhooks.errors import (
    CompiledModelError,
    ModelError,
    NotATensorError,
    PatternError,
    SettingError,
    SiteNeverFiredError,
    UnknownSiteError,
)
from maskhooks.sites.site import Site
from tests.conftest import fingerprint
from tests.models import MLP, Nested, Noisy, Stack

TOKENS = torch.randint(0, 10, (2, 3))


def test_any_module() -> None:
    hooked = maskhooks.wrap(nn.Linear(2, 2))
    assert len(hooked.sites) == 0
    assert hooked(torch.zeros(1, 2)).shape == (1, 2)


def test_sites_as_mapping_list_and_addresses() -> None:
    model = Stack()
    hooked = maskhooks.wrap(model, sites={"embed:output": "batch token hidden -> batch token"})
    assert hooked.sites[0].tags == {"hidden"}
    assert hooked.sites[0].depth == 0
    hooked = maskhooks.wrap(model, sites=[Site.parse("head:output", depth=7), "embed:output"])
    assert [(str(site), site.depth) for site in hooked.sites] == [("head:output", 7), ("embed:output", 1)]


def test_example_fills_in_shapes_and_leaves_the_model() -> None:
    model = Noisy()
    x = torch.randn(3, 4)
    before = fingerprint(model)
    hooked = maskhooks.wrap(model, sites={"norm:output": "batch feature -> batch feature"}, example=x)
    assert fingerprint(model) == before
    assert hooked.sites[0].shape == (3, 4)
    assert "[3, 4]" in repr(hooked.sites)


def test_optional_sites_may_stay_silent_in_the_example() -> None:
    model = Stack()
    model.spare = nn.Linear(2, 2)
    sites = [
        Site.parse("head:output"),
        Site.parse("spare:output", optional=True),
        Site.parse("embed:output", optional=True),
    ]
    with pytest.warns(maskhooks.errors.UnfiredSiteWarning):  # type: ignore[attr-defined]
        hooked = maskhooks.wrap(model, sites=sites, example=(TOKENS,))
    assert [site.shape for site in hooked.sites] == [(2, 2), None, (2, 3, 4)]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sites": {"hed:output": "batch x -> batch"}}, UnknownSiteError, "Did you mean 'head'"),
        ({"sites": {"head": "batch x -> batch"}}, UnknownSiteError, "is not a site address"),
        ({"sites": {"head:output": "batch x"}}, PatternError, "needs one arrow"),
        ({"sites": {"layers*:output": "batch x -> batch"}}, UnknownSiteError, r"no module 'layers\*'"),
        (
            {"sites": {"head:output": "a b c -> a"}, "example": (TOKENS,)},
            PatternError,
            r"'head:output': 'batch feature",
        ),
        ({"sites": ["layers:output"], "example": (TOKENS,)}, SiteNeverFiredError, "layers:output"),
        ({"sites": ["head:output[0]"], "example": (TOKENS,)}, NotATensorError, r"no \[0\] in a tensor"),
        (
            {"sites": ["head:output"], "example": {"x": TOKENS}, "colour": 1},
            SettingError,
            "wrap has no setting 'colour'",
        ),
        ({"adapter": object()}, SettingError, "wrap: adapter must be an Adapter"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Stack()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        maskhooks.wrap(model, **settings)
    assert fingerprint(model) == before


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_module() -> None:
    with pytest.raises(ModelError, match=r"hooked\.model"):
        maskhooks.wrap(maskhooks.wrap(MLP()))
    with pytest.raises(ModelError, match=r"got str\. Load the model first"):
        maskhooks.wrap("bert")


def test_what_stands_for_a_module() -> None:
    model = nn.Linear(2, 2)
    assert maskhooks.wrap(SimpleNamespace(_module=model)).model is model
    with pytest.raises(ModelError, match="got SimpleNamespace"):
        maskhooks.wrap(SimpleNamespace(_module="bert"))
    model._module = nn.Linear(3, 3)  # a module of this name is a part like any other
    assert maskhooks.wrap(model).model is model


def test_compiled_models() -> None:
    model = torch.compile(MLP(), backend="eager")
    with pytest.raises(CompiledModelError, match="_orig_mod"):
        maskhooks.wrap(model, sites=["_orig_mod.first:output"])
    assert len(maskhooks.wrap(model._orig_mod, sites=["first:output"]).sites) == 1


def test_nested_outputs_by_address() -> None:
    sites = {"parts:output[1].double": "batch feature -> batch feature"}
    hooked = maskhooks.wrap(Nested(), sites=sites, example=torch.randn(3, 4))
    assert hooked.sites[0].shape == (3, 4)


def test_a_task_may_be_given() -> None:
    class Mine(maskhooks.Task):
        name = "mine"

        def call(self, model: nn.Module, batch: Any) -> Any:
            return model(batch["tokens"])

    hooked = maskhooks.wrap(Stack(), task=Mine())
    assert hooked({"tokens": TOKENS}).shape == (2, 2)
    assert "task mine" in repr(hooked)
