"""Patterns: how a value's axes map to its gated positions, as an einops arrow.

`"batch token hidden -> batch token"` gates each token as a whole. `"batch token (head dim) -> batch token
head"` with `head=12` gates each head of each token. Axes fall into three kinds:

- position: gated, with a size that may differ from batch to batch (`batch`, `token`); the first is the batch;
- group: gated, with a size given in the pattern (`head`);
- feature: not gated (`hidden`, `dim`).

A baseline has the group and feature axes; a probe reads them and returns one logit per group.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import einops
from jaxtyping import Shaped
from torch import Tensor

from maskhooks.errors import PatternError

_AXIS = re.compile(r"[A-Za-z](?:[A-Za-z0-9_]*[A-Za-z0-9])?")  # the rule of einops


@dataclass(frozen=True)
class Pattern:
    """An einops arrow from a value's axes to its gated positions.

    Args:
        arrow: for example `"batch token hidden -> batch token"`; axes on the right must also be on the left.
        sizes: sizes of axes inside parentheses, such as `{"head": 12}`.

    Raises:
        PatternError: the arrow cannot be parsed.
    """

    arrow: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        left, right = self._sides()
        words = [f"({' '.join(axes)})" if len(axes) != 1 else axes[0] for axes in _groups(left)]
        object.__setattr__(self, "arrow", f"{' '.join(words)} -> {' '.join(right.split())}")
        inside = [axis for group in self.axes for axis in group]
        if len(set(inside)) != len(inside) or not inside:
            raise PatternError(f"pattern {self.arrow!r}: the left side must list at least one axis, and each only once")
        if not set(right.split()) <= set(inside) or len(set(right.split())) != len(right.split()):
            raise PatternError(
                f"pattern {self.arrow!r}: the right side must list axes of the left side, each once and "
                f"without parentheses; the left side has {', '.join(inside)}"
            )
        if not right.split():
            raise PatternError(f"pattern {self.arrow!r} gates nothing: name at least the batch axis on the right side")
        self._check_sizes(inside)
        sizes = {axis: self.sizes[axis] for axis in inside if axis in self.sizes}
        object.__setattr__(self, "sizes", sizes)  # in a fixed order, so that equal patterns print and hash alike

    def _check_sizes(self, inside: list[str]) -> None:
        for name, size in self.sizes.items():
            if name not in inside:
                raise PatternError(
                    f"pattern {self.arrow!r} has a size for {name!r}, which is not one of its axes: {', '.join(inside)}"
                )
            if size < 1:
                raise PatternError(f"pattern {self.arrow!r}: the size of {name!r} is {size}, but must be 1 or more")

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        return ", ".join([self.arrow, *(f"{name}={size}" for name, size in self.sizes.items())])

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Parse a pattern such as `"batch token (head dim) -> batch token head, head=12"`; the inverse of `str`."""
        if isinstance(text, Pattern):
            return text
        arrow, *pairs = text.split(",")
        sizes: dict[str, int] = {}
        for pair in pairs:
            name, _, size = (part.strip() for part in pair.partition("="))
            if not (size.isascii() and size.isdigit()) or name in sizes:
                raise PatternError(f"pattern {text!r}: {pair.strip()!r} must have the form axis=size, once per axis")
            sizes[name] = int(size)
        return cls(arrow, sizes)

    def _sides(self) -> tuple[str, str]:
        sides = self.arrow.split("->")
        if len(sides) != 2:
            raise PatternError(f"pattern {self.arrow!r} needs one arrow, as in 'batch token hidden -> batch token'")
        left, right = sides
        rest = re.sub(r"\(([^()]*)\)", r" \1 ", left) + " " + right
        odd = [word for word in rest.split() if not _AXIS.fullmatch(word)]
        if odd:
            raise PatternError(
                f"pattern {self.arrow!r}: {odd[0]!r} is not an axis name; names consist of letters, digits and "
                "inner _. Parentheses, on the left side only, hold the axes that one dimension is split into"
            )
        return left, right

    @functools.cached_property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The left side: one tuple of axes per dimension of the value."""
        return _groups(self.arrow.split("->")[0])

    @functools.cached_property
    def _plain(self) -> tuple[str, ...] | None:
        """The axes of the left side if each dimension is one axis of any size; else None."""
        plain = not self.sizes and all(len(group) == 1 for group in self.axes)
        return tuple(axis for (axis,) in self.axes) if plain else None

    @functools.cached_property
    def gated(self) -> tuple[str, ...]:
        """The right side: the axes of the mask."""
        return tuple(self.arrow.split("->")[1].split())

    @functools.cached_property
    def positions(self) -> tuple[str, ...]:
        """Gated axes without a given size, in the mask's order."""
        return tuple(axis for axis in self.gated if axis not in self.sizes)

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """Gated axes with a given size, in the mask's order."""
        return tuple(axis for axis in self.gated if axis in self.sizes)

    @functools.cached_property
    def features(self) -> tuple[str, ...]:
        """Group and feature axes, in the value's order: what a baseline has and a probe reads."""
        return tuple(axis for group in self.axes for axis in group if axis not in self.positions)

    def shape(self, value: Tensor, *, site: object = None) -> dict[str, int]:
        """Return the size of every axis in a value.

        Raises:
            PatternError: the value does not fit.
        """
        where = f" at {site}" if site is not None else ""
        if value.dim() != len(self.axes):
            raise PatternError(
                f"pattern '{self}' has {len(self.axes)} axes, but the value{where} has shape "
                f"{list(value.shape)}. "
                f"Give a pattern with {value.dim()} axes, for example "
                f"wrap(model, sites={{{str(site or 'address')!r}: {suggestion(value.dim())!r}}})",
                site=site,
            )
        if self._plain is not None:
            return dict(zip(self._plain, value.shape, strict=True))
        sizes: dict[str, int] = {}
        for group, size in zip(self.axes, value.shape, strict=True):
            known = 1
            for axis in group:
                known *= self.sizes.get(axis, 1)
            free = [axis for axis in group if axis not in self.sizes]
            if len(free) > 1 or size % known or (not free and size != known):
                raise PatternError(
                    f"pattern '{self}' does not fit the value{where} of shape {list(value.shape)}: the axis "
                    f"({' '.join(group)}) of size {size} cannot be split with the sizes {dict(self.sizes)}. "
                    f"Give the sizes after the arrow, as in '{self.arrow}, {group[0]}=2'",
                    site=site,
                )
            sizes.update({axis: self.sizes.get(axis, size // known) for axis in group})
        return sizes

    def mask_shape(self, value: Tensor, *, site: object = None) -> tuple[int, ...]:
        """Return the shape of a mask for this value, axes as on the right side."""
        sizes = self.shape(value, site=site)
        return tuple(sizes[axis] for axis in self.gated)

    def spread(self, mask: Shaped[Tensor, "*gated"], value: Tensor) -> Tensor:
        """Return a mask of gated positions in a shape that broadcasts against the value (a view where possible)."""
        if all(len(group) == 1 for group in self.axes):
            left = " ".join(axis if axis in self.gated else "1" for (axis,) in self.axes)
            return einops.rearrange(mask, f"{' '.join(self.gated)} -> {left}")
        sizes = self.shape(value)
        missing = {axis: size for axis, size in sizes.items() if axis not in self.gated}
        return einops.repeat(mask, f"{' '.join(self.gated)} -> {self.arrow.split('->')[0]}", **missing)

    def spread_features(self, baseline: Shaped[Tensor, "*feature"], value: Tensor) -> Tensor:
        """Return a baseline over the feature axes in a shape that broadcasts against the value."""
        left = " ".join(
            word if all(axis in self.features for axis in axes) else "1"
            for axes, word in ((axes, f"({' '.join(axes)})" if len(axes) > 1 else axes[0]) for axes in self.axes)
        )
        if any(0 < sum(axis in self.features for axis in axes) < len(axes) for axes in self.axes):
            raise PatternError(f"pattern '{self}' mixes position and feature axes in one pair of parentheses")
        return einops.rearrange(baseline, f"{' '.join(self.features)} -> {left}")

    def rows(self, value: Tensor, *, site: object = None) -> Shaped[Tensor, "*position feature"]:
        """Return the value with position axes first and features flattened into the last axis."""
        sizes = self.shape(value, site=site)
        if self.in_rows:
            return value
        left = self.arrow.split("->")[0]
        return einops.rearrange(
            value,
            f"{left} -> {' '.join(self.positions)} ({' '.join(self.features)})",
            **{axis: size for axis, size in sizes.items() if self._inside_parenthesis(axis)},
        )

    @functools.cached_property
    def in_rows(self) -> bool:
        """Whether values have position axes first and one feature axis last."""
        order = (*self.positions, *self.features)
        return self.axes == tuple((axis,) for axis in order) and len(self.features) == 1

    def feature_shape(self, value: Tensor, *, site: object = None) -> tuple[int, ...]:
        """Return the sizes of the feature axes in a value."""
        sizes = self.shape(value, site=site)
        return tuple(sizes[axis] for axis in self.features)

    def per_feature(self, value: Tensor, *, site: object = None) -> Pattern:
        """Return the pattern that also gates each feature by itself, with the sizes of a value."""
        sizes = self.shape(value, site=site)
        right = [*self.gated, *(axis for axis in self.features if axis not in self.gated)]
        return Pattern(
            f"{self.arrow.split('->')[0]}-> {' '.join(right)}", {axis: sizes[axis] for axis in self.features}
        )

    def _inside_parenthesis(self, axis: str) -> bool:
        return any(len(group) > 1 and axis in group for group in self.axes)


def _groups(left: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(_AXIS.findall(word)) for word in re.findall(r"\([^()]*\)|[^\s()]+", left))


def suggestion(dimensions: int) -> str:
    """Return a common pattern for a value with this many dimensions."""
    usual = {
        1: "batch -> batch",
        2: "batch feature -> batch feature",
        3: "batch token hidden -> batch token",
        4: "batch channel height width -> batch height width",
    }
    names = ["batch", *(f"axis{i}" for i in range(1, dimensions))]
    return usual.get(dimensions, f"{' '.join(names)} -> {' '.join(names[:-1])}")
