"""Patterns: parse and print are inverse; masks, baselines and rows land where the arrow says."""

from __future__ import annotations

import keyword
import math
from typing import Any

import einops
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from maskhooks.errors import PatternError
from maskhooks.sites.pattern import Pattern, suggestion

names = st.from_regex(r"[a-z]([a-z0-9_]{0,2}[a-z0-9])?", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[str, dict[str, int], list[list[str]]]:
    """Any pattern: groups of axes, sizes for all but one of each group, any gated subset in any order."""
    axes = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    groups: list[list[str]] = []
    for axis in axes:
        if groups and draw(st.booleans()):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    sizes = {axis: draw(st.integers(1, 3)) for group in groups for axis in group[1:]}
    for group in groups:
        if draw(st.booleans()):
            sizes[group[0]] = draw(st.integers(1, 3))
    gated = draw(st.permutations(axes))[: draw(st.integers(1, len(axes)))]
    left = " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in groups)
    return f"{left} -> {' '.join(gated)}", sizes, groups


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, int], list[int]]:
    """A pattern, and the shape of a value that it fits."""
    arrow, sizes, groups = draw(patterns())
    shape = []
    for group in groups:
        free = draw(st.integers(1, 3)) if any(axis not in sizes for axis in group) else 1
        shape.append(math.prod((free, *(sizes.get(axis, 1) for axis in group))))
    return arrow, sizes, shape


def made(case: tuple[str, dict[str, int], list[int]]) -> tuple[Pattern, torch.Tensor]:
    arrow, sizes, shape = case
    return Pattern(arrow, sizes), torch.arange(float(math.prod(shape))).reshape(shape)


@given(patterns())
def test_parse_is_the_inverse_of_str(case: Any) -> None:
    pattern = Pattern(*case[:2])
    again = Pattern.parse(str(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert str(again) == str(pattern)


@given(cases())
def test_spread_puts_each_mask_value_at_its_place(case: Any) -> None:
    pattern, value = made(case)
    sizes = pattern.shape(value)
    mask = torch.arange(float(torch.Size(pattern.mask_shape(value)).numel())).reshape(pattern.mask_shape(value))
    spread = pattern.spread(mask, value).expand_as(value)
    left = pattern.arrow.split("->")[0]
    flat = einops.rearrange(spread, f"{left} -> {' '.join(a for g in pattern.axes for a in g)}", **sizes)
    order = [axis for group in pattern.axes for axis in group]
    for index in torch.cartesian_prod(*(torch.arange(sizes[a]) for a in order), torch.arange(1)).tolist():
        at = dict(zip(order, index, strict=False))
        assert flat[tuple(index[:-1])] == mask[tuple(at[a] for a in pattern.gated)]


@given(cases())
def test_rows_keep_every_value_once(case: Any) -> None:
    pattern, value = made(case)
    sizes = pattern.shape(value)
    rows = pattern.rows(value)
    assert rows.shape[:-1] == tuple(sizes[axis] for axis in pattern.positions)
    assert rows.shape[-1] == torch.Size(pattern.feature_shape(value)).numel()
    assert sorted(rows.flatten().tolist()) == sorted(value.flatten().tolist())
    back = einops.rearrange(
        rows,
        f"{' '.join(pattern.positions)} ({' '.join(pattern.features)}) -> {pattern.arrow.split('->')[0]}",
        **sizes,
    )
    assert torch.equal(back, value)


@given(cases())
def test_a_baseline_lands_on_its_features(case: Any) -> None:
    pattern, value = made(case)
    mixed = any(0 < len(set(axes) & set(pattern.positions)) < len(axes) for axes in pattern.axes)
    assume(not mixed)
    shape = pattern.feature_shape(value)
    baseline = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    filled = pattern.spread_features(baseline, value).expand_as(value)
    assert torch.equal(pattern.rows(filled), baseline.flatten().expand_as(pattern.rows(value)))


def test_kinds_of_axes() -> None:
    pattern = Pattern.parse("batch token (head dim) -> batch token head, head=12")
    assert pattern.axes == (("batch",), ("token",), ("head", "dim"))
    assert pattern.gated == ("batch", "token", "head")
    assert pattern.positions == ("batch", "token")
    assert pattern.groups == ("head",)
    assert pattern.features == ("head", "dim")
    value = torch.zeros(2, 3, 24)
    assert pattern.shape(value) == {"batch": 2, "token": 3, "head": 12, "dim": 2}
    assert pattern.mask_shape(value) == (2, 3, 12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a  b ->a", "a b -> a"),
        ("a(b c) -> a, b=2", "a (b c) -> a, b=2"),
        ("(a) b -> a", "a b -> a"),
        ("a (b c) -> a, c=3, b=2", "a (b c) -> a, b=2, c=3"),
    ],
)
def test_one_way_to_print(one: str, other: str) -> None:
    assert str(Pattern.parse(one)) == str(Pattern.parse(other))
    assert Pattern.parse(one) == Pattern.parse(other)
    assert hash(Pattern.parse(one)) == hash(Pattern.parse(other))


def test_spread_is_a_view_where_one_exists() -> None:
    mask = torch.rand(2, 3)
    spread = Pattern("batch token hidden -> batch token").spread(mask, torch.zeros(2, 3, 4))
    assert spread.shape == (2, 3, 1)
    assert spread.data_ptr() == mask.data_ptr()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch token", "needs one arrow"),
        ("a -> b -> c", "needs one arrow"),
        ("a b -> c", "the left side has a, b"),
        ("a a -> a", "each only once"),
        ("a b -> a a", "each once"),
        ("a b -> (a b)", "not an axis name"),
        ("a b ->", "at least the batch axis"),
        ("-> a", "the left side must list at least one axis"),
        ("a ... -> a", "'...' is not an axis name"),
        ("a (b (c d)) -> a", "not an axis name"),
        ("a (b -> a", "not an axis name"),
        ("a b_ -> a", "'b_' is not an axis name"),
        ("a 1 -> a", "'1' is not an axis name"),
        ("a b -> a, c=2", "'c', which is not one of its axes"),
        ("a b -> a, b=0", "must be 1 or more"),
        ("a b -> a, b", "must have the form axis=size"),
        ("a b -> a, b=²", "must have the form axis=size"),
        ("a b -> a, b=2, b=3", "once per axis"),
    ],
)
def test_patterns_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=message) as raised:
        Pattern.parse(text)
    assert text.split(",")[0].split()[0] in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (
            "batch token hidden -> batch token",
            (2, 3),
            r"has 3 axes, but the value at x:output has shape \[2, 3\]",
        ),
        ("batch (head dim) -> batch head, head=5", (2, 12), r"\(head dim\) of size 12 cannot be split"),
        ("batch (head dim) -> batch head", (2, 12), "Give the sizes after the arrow"),
        ("batch hidden -> batch, hidden=3", (2, 4), "of size 4"),
    ],
)
def test_values_that_do_not_fit(pattern: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(PatternError, match=message) as raised:
        Pattern.parse(pattern).shape(torch.zeros(shape), site="x:output")
    assert raised.value.site == "x:output"


def test_position_and_feature_axes_in_one_parenthesis_have_no_baseline() -> None:
    pattern = Pattern.parse("(batch hidden) -> batch, hidden=2")
    with pytest.raises(PatternError, match="mixes position and feature axes"):
        pattern.spread_features(torch.zeros(2), torch.zeros(6))


@pytest.mark.parametrize("dimensions", range(1, 7))
def test_suggestions_fit(dimensions: int) -> None:
    value = torch.zeros([2] * dimensions)
    assert len(Pattern.parse(suggestion(dimensions)).shape(value)) == dimensions
