"""Adapters: who claims which module, and whose sites count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from maskhooks.errors import AdapterConflictError
from maskhooks.model.adapter import Adapter, claimed_sites, claims, join, stacks
from maskhooks.model.task import Task
from maskhooks.model.wrapping import wrap
from maskhooks.sites.site import Site


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
        self.cell = nn.GRU(2, 2)


class Derived(Encoder):
    pass


class Net(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.rnn = nn.GRU(2, 2)


class ByType(Adapter):
    def __init__(self, name: str, *claimed: type[nn.Module]) -> None:
        self.name = name
        self._claimed = claimed

    def types(self) -> tuple[type[nn.Module], ...]:
        return self._claimed

    def sites(self, name: str, module: nn.Module) -> Iterable[Site]:
        for child, _ in module.named_modules():
            yield Site(join(name, child), tags=frozenset({self.name}))


def found(model: nn.Module, *adapters: Adapter) -> list[tuple[str, str]]:
    return [(claim.adapter.name, claim.name) for claim in claims(model, adapters)]


def test_modules_are_claimed_wherever_they_stand() -> None:
    model = Net(Encoder())
    assert found(model, ByType("e", Encoder), ByType("g", nn.GRU)) == [
        ("e", "encoder"),
        ("g", "encoder.cell"),
        ("g", "rnn"),
    ]
    assert found(nn.Linear(2, 2), ByType("e", Encoder)) == []
    assert found(Encoder(), ByType("e", Encoder)) == [("e", "")]


def test_the_more_derived_claim_wins() -> None:
    general, special = ByType("general", Encoder), ByType("special", Derived)
    for adapters in [(general, special), (special, general)]:
        assert found(Net(Derived()), *adapters) == [("special", "encoder")]
    assert found(Net(Encoder()), general, special) == [("general", "encoder")]


def test_an_adapters_claim_covers_what_is_below() -> None:
    assert found(Encoder(), ByType("all", Encoder, nn.GRU)) == [("all", "")]


def test_a_tie_names_both() -> None:
    with pytest.raises(
        AdapterConflictError, match=r"'a' and 'b' both claim module 'encoder' \(Encoder\).*adapter="
    ) as raised:
        claims(Net(Encoder()), [ByType("a", Encoder), ByType("b", Encoder)])
    assert raised.value.plugin == "a"


def test_within_a_deeper_claim_only_its_own_sites_count() -> None:
    model = Encoder()
    sites = claimed_sites(claims(model, [ByType("outer", Encoder), ByType("inner", nn.GRU)]))
    tags = {site.module: next(iter(site.tags)) for site in sites}
    assert tags == {"": "outer", "layers": "outer", "layers.0": "outer", "layers.1": "outer", "cell": "inner"}


class Whole(ByType):
    """Has one site for all modules of its types, and depths that count them from the last."""

    claims_model = True

    def sites(self, name: str, module: nn.Module) -> Iterable[Site]:
        yield Site(join(name, "all"))
        yield from (Site(child) for child, part in module.named_modules() if isinstance(part, self._claimed))

    def places(self, module: nn.Module) -> Mapping[str, nn.Module]:
        return {"all": nn.Identity()}

    def complete_sites(self, sites: Sequence[Site], fired: Sequence[Site] = ()) -> Sequence[Site]:
        return [dataclasses.replace(site, depth=depth) for depth, site in enumerate([*reversed(sites)])]


def test_a_claim_on_the_whole_model() -> None:
    model = Net(Encoder())
    adapters = [Whole("w", nn.GRU), ByType("e", Encoder)]
    assert found(model, *adapters) == [("e", "encoder"), ("w", "")]
    assert found(nn.Linear(2, 2), *adapters) == []
    sites = claimed_sites(claims(model, adapters))
    assert [str(site) for site in sites if "e" not in site.tags] == ["rnn:output", "all:output"]
    assert [site.depth for site in sites if "e" not in site.tags] == [0, 1]
    both = claimed_sites(claims(model, [Whole("w", nn.GRU), ByType("n", Net)]))
    assert {str(site): site.depth for site in both}["all:output"] is not None
    assert {str(site): site.depth for site in both}["encoder:output"] is None


class Tasked(ByType):
    def task(self, model: nn.Module) -> Task:
        return Task(output=lambda result: Categorical(logits=result))


def test_an_adapters_task_serves_where_no_plugin_claims_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    hooked = wrap(model, adapter=Tasked("t", nn.Linear))
    assert isinstance(hooked.distribution(model(torch.ones(1, 2)), None), Categorical)
    assert wrap(model, adapter=ByType("b", nn.Linear)).task.name == "function"


def test_covers() -> None:
    claim = claims(Net(Encoder()), [ByType("g", nn.GRU)])[1]
    assert claim.covers("rnn")
    assert claim.covers("rnn.inner")
    assert not claim.covers("rnn2")


def test_join() -> None:
    assert join("", "encoder") == "encoder"
    assert join("a", "b.c") == "a.b.c"
    assert join("a", "") == "a"


def test_stacks_are_lists_of_layers_largest_first() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.layers = nn.ModuleList([Mixture() for _ in range(3)])
            self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.empty = nn.ModuleList()
            self.drops = nn.ModuleList([nn.Dropout() for _ in range(3)])

    assert stacks(Model()) == [["layers.0", "layers.1", "layers.2"], ["small.0", "small.1"]]
