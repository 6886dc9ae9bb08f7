"""Sites: addresses of values in a model, and the table that finds them by name, glob or tag."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

from torch import nn

from maskhooks.errors import PatternError, UnknownSiteError, near
from maskhooks.sites import nested
from maskhooks.sites import text_table as table
from maskhooks.sites.modules import check_compiled
from maskhooks.sites.pattern import Pattern

_ADDRESS = re.compile(
    r"(?P<module>[^:@\[\]]*)(?:@(?P<call>\d+|\*))?:(?P<port>input|output)(?P<path>(?:\.[^.\[\]]+|\[-?\d+\])*)"
)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(-?\d+)\]")


@dataclass(frozen=True)
class Site:
    """An address of a value, and how it is gated.

    The address prints as `module[@call]:input|output[.path]`, for example `bert.encoder.layer.0:output`,
    `cell@3:output`, `layers.3:input.hidden_states` or `rnn:output[1]`; `Site.parse` is the inverse of `str`.

    Args:
        module: the module's name as in `model.named_modules()`, or one that `model.get_submodule` finds; empty for
            the model itself.
        port: `"input"` or `"output"`. An input's path begins with the argument, by position or by name,
            however the caller passed it; without a path it is the first argument.
        path: steps into a nested value.
        call: which call within one forward pass: a number from 0, `"*"` for each, None where there is just
            one.
        pattern: the gated positions; None for a site that is only read.
        tags: for example `{"hidden"}`; the output of a word embedding has both `input` and `hidden`.
        depth: place in the order of computation.
        optional: never firing is reported instead of being an error.
        shape: the value's shape, where an example was given.
    """

    module: str
    port: Literal["input", "output"] = "output"
    path: nested.Path = ()
    call: int | Literal["*"] | None = None
    pattern: Pattern | None = None
    tags: frozenset[str] = field(default_factory=frozenset)
    depth: int | None = None
    optional: bool = field(default=False, compare=False)
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self._address

    def __hash__(self) -> int:
        return hash(self._address)

    @functools.cached_property
    def _address(self) -> str:
        call = "" if self.call is None else f"@{self.call}"
        return f"{self.module}{call}:{self.port}{nested.format_path(self.path)}"

    @classmethod
    def parse(cls, address: str, pattern: str | Pattern | None = None, **settings: Any) -> Site:
        """A site from its address.

        Raises:
            UnknownSiteError: the text is no address.
            PatternError: the pattern cannot be read.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise UnknownSiteError(
                f"{address!r} is no site address; addresses look like 'encoder.layer.0:output', "
                f"'cell@3:output', 'layers.3:input.hidden_states' or 'rnn:output[1]' (the colon is needed)",
                site=address,
            )
        call = match["call"]
        path = tuple(name or int(index) for name, index in _STEP.findall(match["path"]))
        return cls(
            module=match["module"],
            port="input" if match["port"] == "input" else "output",
            path=path,
            call="*" if call == "*" else None if call is None else int(call),
            pattern=None if pattern is None else Pattern.parse(pattern),
            **settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON has it; `from_dict` is the inverse."""
        return {
            "address": str(self),
            "pattern": None if self.pattern is None else str(self.pattern),
            "tags": sorted(self.tags),
            "depth": self.depth,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Site:
        """The inverse of `to_dict`."""
        return cls.parse(saved["address"], saved["pattern"], tags=frozenset(saved["tags"]), depth=saved["depth"])

    def at(self, call: int | Literal["*"] | None) -> Site:
        """The same site at one call, or at each."""
        return replace(self, call=call)

    def gating(self) -> Pattern:
        """The site's pattern.

        Raises:
            PatternError: the site has none, or stands for all calls at once.
        """
        if self.call == "*":
            raise PatternError(
                f"site {self} stands for all calls, each with a value of its own, and gates are for one value. Mask "
                f"each call by itself: ['{self.at(0)}', '{self.at(1)}', ...]; hooked.tap takes all calls at once",
                site=self,
            )
        if self.pattern is None:
            raise PatternError(
                f"site {self} has no pattern, so its positions cannot be gated. Give one: "
                f"wrap(model, sites={{'{self}': 'batch token hidden -> batch token'}})",
                site=self,
            )
        return self.pattern


Selector = str | Site | Iterable["str | Site"]


class SiteTable(Sequence[Site]):
    """The sites of a model, in the order of computation."""

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        self._sites = list(sites)
        self._by_name = {str(site): site for site in self._sites}

    def __len__(self) -> int:
        return len(self._sites)

    @overload
    def __getitem__(self, index: int | str) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> SiteTable: ...
    def __getitem__(self, index: int | str | slice) -> Site | SiteTable:
        if isinstance(index, slice):
            return SiteTable(self._sites[index])
        if not isinstance(index, str):
            return self._sites[index]
        if index not in self._by_name:
            known = near(index, self._by_name)
            raise UnknownSiteError(f"no site {index!r} is listed here.", site=index, near=known)
        return self._by_name[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    @property
    def tags(self) -> list[str]:
        """All tags, in alphabetical order."""
        return sorted({tag for site in self._sites for tag in site.tags})

    def get(self, address: str) -> Site | None:
        """The site with this address; None where there is none."""
        return self._by_name.get(address)

    def tagged(self, tag: str) -> list[Site]:
        """The sites with a tag."""
        return [site for site in self._sites if tag in site.tags]

    def glob(self, pattern: str) -> list[Site]:
        """The sites whose address matches a glob; `*` crosses dots, `[1]` is a path, not a set of letters."""
        match = _glob(pattern)
        return [site for site in self._sites if match(str(site))]

    def rows(self) -> list[dict[str, str]]:
        """The table as text, one dictionary a site: address, pattern, tags, depth, shape."""
        return [
            {
                "address": str(site),
                "pattern": str(site.pattern or ""),
                "tags": " ".join(sorted(site.tags)),
                "depth": "" if site.depth is None else str(site.depth),
                "shape": "" if site.shape is None else str(list(site.shape)),
            }
            for site in self._sites
        ]

    def __repr__(self) -> str:
        return table.text(self.rows()) if self._sites else "SiteTable: no sites"

    def _repr_html_(self) -> str:
        return table.markup(self.rows()) if self._sites else "no sites"


def is_glob(text: str) -> bool:
    """Whether a selector asks for many sites; an `@*` alone asks for all calls of one."""
    return "*" in text.replace("@*", "") or "?" in text


def resolve(selector: Selector, table: SiteTable, modules: Mapping[str, nn.Module]) -> list[Site]:
    """The sites meant by an address, a glob, a tag, a Site, or several of these, without repetition.

    A glob looks through the table; where nothing there matches, through the inputs and outputs of all
    modules. Sites found by a glob are optional: never firing is reported, and an error only where none of
    them ever fired.

    Raises:
        UnknownSiteError: nothing matches; near names are listed.
        CompiledModelError: the site is one of a compiled or scripted module, in which none is found.
    """
    if isinstance(selector, Site):
        return [selector]
    if not isinstance(selector, str):
        found = [site for item in selector for site in resolve(item, table, modules)]
        return list({str(site): site for site in found}.values())
    if table.get(selector) is not None:
        return [table[selector]]
    if ":" not in selector and table.tagged(selector):
        return table.tagged(selector)
    if is_glob(selector):
        found = table.glob(selector)
        if not found:
            match = _glob(selector)
            found = [site for name in modules for site in (Site(name, "input"), Site(name)) if match(str(site))]
        if found:
            return [replace(site, optional=True) for site in found]
    elif _ADDRESS.fullmatch(selector):
        site = Site.parse(selector)
        every = table.get(str(site.at("*"))) or table.get(str(site.at(None))) if isinstance(site.call, int) else None
        if site.module in modules:
            return [site if every is None else replace(every, call=site.call, shape=None)]
        check_compiled(site, site.module, modules)
    known = [str(site) for site in table] + table.tags + [f"{name}:output" for name in modules]
    what = "glob matches no site" if is_glob(selector) else "no site"
    listed = f"There are {len(table)} listed sites (hooked.sites, or `maskhooks sites`)"
    listed += f" with the tags {', '.join(table.tags)}" if table.tags else ""
    if not len(table):
        listed = (
            "No sites are listed (list some: wrap(model, sites={'NAME:output': 'batch token hidden -> batch token'}))"
        )
    raise UnknownSiteError(
        f"{what}: {selector!r}. {listed}, and {len(modules)} modules, each with an input and an output.",
        site=selector,
        near=near(selector, known),
    )


def _glob(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
    return lambda text: expression.match(text) is not None
