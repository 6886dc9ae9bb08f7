"""Hooked: selectors reach the tap, adapters open and close what hides a site."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.errors import SiteConflictError, SiteNeverFiredError, UnfiredSiteWarning, UnknownSiteError
from maskhooks.model.adapter import Adapter
from maskhooks.sites.site import Site
from tests.models import MLP, Stack

TOKENS = torch.randint(0, 10, (2, 3))


@pytest.fixture
def hooked() -> maskhooks.Hooked:
    patterns = {f"layers.{i}:output": "batch token hidden -> batch token" for i in range(3)}
    return maskhooks.wrap(Stack(), sites=patterns, output=lambda logits: Categorical(logits=logits))


def test_read_by_address_glob_tag_and_site(hooked: maskhooks.Hooked) -> None:
    layers = ["layers.0:output", "layers.1:output", "layers.2:output"]
    for selector, found in [
        ("layers.1:output", layers[1:2]),
        ("layers.*:output", layers),
        ("hidden", layers),
        (["embed:output", Site.parse("head:output")], ["embed:output", "head:output"]),
        (hooked.sites[2], layers[2:]),
    ]:
        with hooked.tap(read=selector) as tap:
            hooked((TOKENS,))
        assert list(tap.values) == found


def test_replace_by_glob(hooked: maskhooks.Hooked) -> None:
    with hooked.tap(read="head:input", replace={"layers.*:output": torch.zeros_like}) as tap:
        hooked((TOKENS,))
    assert not tap.values["head:input"].any()


def test_selectors_that_replace_one_value_twice(hooked: maskhooks.Hooked) -> None:
    """A dictionary of sites alone would keep the last function and say nothing."""
    for replace in [
        {"layers.0:output": torch.neg, "layers.*:output": torch.zeros_like},
        {"layers.0:output": torch.neg, "hidden": torch.zeros_like},
        {"layers.0:output": torch.neg, Site.parse("layers.0:output"): torch.zeros_like},
    ]:
        with pytest.raises(SiteConflictError, match=r"layers\.0:output"), hooked.tap(replace=replace):
            pass


def test_sites_found_by_glob_are_an_error_only_when_none_fired(hooked: maskhooks.Hooked) -> None:
    hooked.model.spared = nn.Linear(4, 4)
    with (
        pytest.warns(UnfiredSiteWarning, match="1 optional sites never fired: spared:output"),
        hooked.tap(read=["*d:output"]) as tap,
    ):
        hooked((TOKENS,))
    assert list(tap.values) == ["embed:output", "head:output"]
    with pytest.raises(SiteNeverFiredError, match="none of the"), hooked.tap(read="spared*"):
        hooked((TOKENS,))
    with pytest.raises(SiteNeverFiredError, match="spared:output"), hooked.tap(read="spared:output"):
        hooked((TOKENS,))


def test_unknown_selectors(hooked: maskhooks.Hooked) -> None:
    for selector in ["layer.0:output", "nothing.*", "hiden"]:
        with pytest.raises(UnknownSiteError, match="Did you mean" if "*" not in selector else "no site matches"):
            hooked.find(selector)


def test_distribution_and_printing(hooked: maskhooks.Hooked) -> None:
    assert isinstance(hooked.distribution(hooked((TOKENS,)), (TOKENS,)), Categorical)
    assert repr(hooked) == "Hooked(Stack, 3 sites, task function, adapters none)"
    assert "layers.0:output" in hooked._repr_html_()


def test_two_hooked_on_one_model() -> None:
    model, x = MLP(), torch.randn(3, 4)
    one, other = maskhooks.wrap(model), maskhooks.wrap(model)
    with one.tap(replace={"first:output": torch.ones_like}), other.tap(read="first:output") as tap:
        other((x,))
    assert tap.values["first:output"].eq(1).all()
    with other.tap(read="first:output") as tap:
        other((x,))
    assert not tap.values["first:output"].eq(1).all()


class Fused(nn.Module):
    """Computes its inner module itself, as a fused kernel does, unless `split` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.split = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if self.split else nn.functional.linear(x, self.inner.weight, self.inner.bias)


class FusedAdapter(Adapter):
    name = "fused"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (Fused,)

    def sites(self, name: str, module: nn.Module) -> Sequence[Site]:
        return [Site(f"{name}.inner", pattern=maskhooks.Pattern("batch feature -> batch"))]

    @contextlib.contextmanager
    def expose_sites(self, name: str, module: nn.Module, sites: Sequence[Site]) -> Iterator[None]:  # type: ignore[override]
        if not name:
            raise RuntimeError("cannot open")
        assert isinstance(module, Fused)
        module.split = True
        try:
            yield
        finally:
            module.split = False


def test_an_adapter_opens_its_kernels_for_the_length_of_a_tap() -> None:
    model, x = nn.Sequential(Fused(), Fused()), torch.randn(2, 4)
    hooked = maskhooks.wrap(model, adapter=FusedAdapter(), example=x)
    assert [site.shape for site in hooked.sites] == [(2, 4), (2, 4)]
    with hooked.tap(read="1.inner:output") as tap:
        assert [module.split for module in model] == [False, True]
        hooked(x)
    assert "1.inner:output" in tap.values
    assert not any(module.split for module in model)
    with pytest.raises(ZeroDivisionError), hooked.tap(read="*inner:output"):
        raise ZeroDivisionError
    assert not any(module.split for module in model)


def test_what_was_opened_is_closed_where_a_later_adapter_raises() -> None:
    class Second(FusedAdapter):
        name = "second"

        def expose_sites(self, name: str, module: nn.Module, sites: Any) -> Any:
            raise RuntimeError("cannot open")

    model = nn.Sequential(Fused(), Fused())
    hooked = maskhooks.wrap(model, adapter=FusedAdapter())
    hooked.claims[1] = type(hooked.claims[1])(Second(), "1", model[1])
    with pytest.raises(RuntimeError, match="cannot open"), hooked.tap(read="*inner:output"):
        pass
    assert not any(module.split for module in model)
