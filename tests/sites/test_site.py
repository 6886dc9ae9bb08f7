"""Sites: parse and print are inverse; the table finds by name, glob and tag; near names are listed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskhooks.errors import PatternError, UnknownSiteError
from maskhooks.sites.site import Site, SiteTable, is_glob, resolve

names = st.text("abz_019", min_size=1, max_size=4)
settings = st.builds(
    dict,
    module=st.lists(names, max_size=3).map(".".join),
    port=st.sampled_from(["input", "output"]),
    path=st.lists(names | st.integers(-5, 20), max_size=3).map(tuple),
    call=st.none() | st.just("*") | st.integers(0, 12),
)


@given(settings)
def test_parse_is_the_inverse_of_str(setting: dict[str, Any]) -> None:
    site = Site(**setting)
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "address",
    [
        "bert.encoder.layer.0:output",
        "cell@3:output",
        "cell@*:output",
        "layers.3:input.hidden_states",
        "rnn:output[1]",
        "rnn:output[1][-1].last",
        ":output",
        ":input",
        "bert.output:output",
        "experts.<a___b__c>:output",
    ],
)
def test_addresses(address: str) -> None:
    assert str(Site.parse(address)) == address


@pytest.mark.parametrize("text", ["encoder", "a:b", "a:output[x]", "a:output.", "a@x:output", "a:output:input", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UnknownSiteError, match=r"is not a site address\. Addresses look like") as raised:
        Site.parse(text)
    assert repr(text) in str(raised.value)


def test_parse_with_a_pattern() -> None:
    site = Site.parse("a:output", "batch token hidden -> batch token", tags=frozenset({"hidden"}))
    assert site.gating().positions == ("batch", "token")
    assert pickle.loads(pickle.dumps(site)) == site
    assert hash(site) == hash(Site.parse("a:output", "batch token hidden->batch token", tags=frozenset({"hidden"})))


def test_gating_without_a_pattern() -> None:
    with pytest.raises(PatternError, match=r"site a:output has no pattern.*sites=\{'a:output'"):
        Site.parse("a:output").gating()


TABLE = SiteTable(
    Site.parse(address, tags=frozenset(tags.split()))
    for address, tags in [
        ("embed:output", "input hidden"),
        ("layers.0:output", "hidden"),
        ("layers.1:output", "hidden"),
        ("layers.10:output", "hidden"),
        ("rnn:output[1]", ""),
    ]
)
MODULES = dict.fromkeys(["", "embed", "layers", "layers.0", "layers.1", "layers.10", "rnn", "head"], nn.Identity())


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("embed:output", ["embed:output"]),
        ("hidden", ["embed:output", "layers.0:output", "layers.1:output", "layers.10:output"]),
        ("input", ["embed:output"]),
        ("layers.*:output", ["layers.0:output", "layers.1:output", "layers.10:output"]),
        ("layers.?:output", ["layers.0:output", "layers.1:output"]),
        ("*[1]", ["rnn:output[1]"]),
        ("head:input.x", ["head:input.x"]),
        ("head@*:output", ["head@*:output"]),
        ("head*", ["head:input", "head:output"]),
        (
            ["layers.1:output", "hidden"],
            ["layers.1:output", "embed:output", "layers.0:output", "layers.10:output"],
        ),
        (Site.parse("nowhere:output"), ["nowhere:output"]),
        ((), []),
    ],
)
def test_resolve(selector: Any, found: list[str]) -> None:
    assert [str(site) for site in resolve(selector, TABLE, MODULES)] == found


def test_sites_found_by_glob_are_optional_and_named_ones_are_not() -> None:
    assert all(site.optional for site in resolve("layers.*:output", TABLE, MODULES))
    assert not resolve("layers.0:output", TABLE, MODULES)[0].optional
    assert not any(site.optional for site in resolve("hidden", TABLE, MODULES))


def test_a_module_with_an_odd_name_does_not_break_a_glob() -> None:
    assert [str(site) for site in resolve("*x:output", SiteTable(), dict.fromkeys(["a:b", "x"], nn.Identity()))] == [
        "x:output"
    ]


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ("layers.0:outpt", "layers.0:output"),
        ("layer.1:output", "layers.1:output"),
        ("hiden", "hidden"),
        ("had:output", "head:output"),
        ("*layrs*", None),
    ],
)
def test_unknown_names_list_the_near_ones(selector: str, near: str | None) -> None:
    with pytest.raises(UnknownSiteError) as raised:
        resolve(selector, TABLE, MODULES)
    assert repr(selector) in str(raised.value)
    assert raised.value.site == selector
    if near is not None:
        assert near in raised.value.near
        assert f"Did you mean {raised.value.near[0]!r}" in str(raised.value)


def test_unknown_names_list_the_tags_or_say_how_to_list_sites() -> None:
    with pytest.raises(
        UnknownSiteError, match=r"5 listed sites .* with the tags hidden, input\. The model has 8 modules"
    ):
        resolve("head", TABLE, MODULES)
    with pytest.raises(UnknownSiteError, match=r"No sites are listed; list some: wrap\(model, sites="):
        resolve("head", SiteTable(), MODULES)


def test_one_call_has_the_pattern_of_all_calls() -> None:
    every = Site.parse("head@*:output", "batch hidden -> batch", tags=frozenset({"hidden"}), depth=3)
    (third,) = resolve("head@2:output", SiteTable([every]), MODULES)
    assert (str(third), third.gating(), third.depth) == ("head@2:output", every.pattern, 3)
    with pytest.raises(PatternError, match=r"each call separately: \['head@0:output', 'head@1:output', \.\.\.\]"):
        every.gating()


def test_one_call_has_the_pattern_of_the_module_listed() -> None:
    listed = Site.parse("head:output", "batch hidden -> batch", tags=frozenset({"hidden"}), depth=3)
    (second,) = resolve("head@1:output", SiteTable([listed]), MODULES)
    assert (str(second), second.gating(), second.depth) == ("head@1:output", listed.pattern, 3)


def test_globs() -> None:
    assert is_glob("a*:output")
    assert is_glob("a?:output")
    assert not is_glob("cell@*:output")
    assert not is_glob("rnn:output[1]")


def test_table() -> None:
    assert len(TABLE) == 5
    assert TABLE["rnn:output[1]"] is TABLE[4]
    assert list(TABLE[:2]) == [TABLE[0], TABLE[1]]
    assert TABLE.tags == ["hidden", "input"]
    assert TABLE.get("nowhere:output") is None
    with pytest.raises(UnknownSiteError, match="Did you mean 'embed:output'"):
        TABLE["embd:output"]


def test_table_prints_only_columns_in_use() -> None:
    lines = repr(TABLE).splitlines()
    assert lines[0].split() == ["address", "tags"]
    assert lines[1].split() == ["embed:output", "hidden", "input"]
    assert repr(SiteTable()) == "SiteTable: no sites"


def test_table_as_html_escapes_names() -> None:
    html = SiteTable([Site("<script>")])._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;:output" in html
    assert "no sites" in SiteTable()._repr_html_()
