"""Sites: addresses of values in a model, and the table that finds them by name, glob or tag."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, overload

from torch import nn

from maskhooks.errors import PatternError, UnknownSiteError, close_matches
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
    """The address of a value, and how it is gated.

    The address prints as `module[@call]:input|output[.path]`, for example `bert.encoder.layer.0:output`,
    `cell@3:output`, `layers.3:input.hidden_states` or `rnn:output[1]`; `Site.parse` is the inverse of `str`.

    Args:
        module: the module's name as in `model.named_modules()`, or one that `model.get_submodule` finds; empty for
            the model itself.
        port: `"input"` or `"output"`. An input's path begins with the argument, by position or by name,
            however the caller passed it; without a path it is the first argument.
        path: steps into a nested value.
        call: which call within one forward pass: a number from 0, `"*"` for each, None if there is only one.
        pattern: the gated positions; None for a site that is only read.
        tags: for example `{"hidden"}`; the output of a word embedding has both `input` and `hidden`.
        depth: place in the order of computation.
        optional: whether a site that never fires is reported instead of being an error.
        shape: the value's shape, if an example was given.
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
        """Parse a site from its address.

        Raises:
            UnknownSiteError: the text is not an address.
            PatternError: the pattern cannot be parsed.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise UnknownSiteError(
                f"{address!r} is not a site address. Addresses look like 'encoder.layer.0:output', "
                f"'cell@3:output', 'layers.3:input.hidden_states' or 'rnn:output[1]' (the colon is required)",
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
        """Return the site as JSON-serialisable data; `from_dict` is the inverse."""
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
        """Return the same site at one call, or at each."""
        return replace(self, call=call)

    def gating(self) -> Pattern:
        """Return the site's pattern.

        Raises:
            PatternError: the site has none, or addresses all calls at once.
        """
        if self.call == "*":
            raise PatternError(
                f"site {self} addresses all calls, each with its own value, but gates are for one value. Mask each "
                f"call separately: ['{self.at(0)}', '{self.at(1)}', ...]; hooked.tap takes all calls at once",
                site=self,
            )
        if self.pattern is None:
            raise PatternError(
                f"site {self} has no pattern, so its positions cannot be gated. Give one: "
                f"wrap(model, sites={{'{self}': 'batch token hidden -> batch token'}})",
                site=self,
            )
        return self.pattern


class Selects:
    """Checks a setting that names sites."""

    words = "a tag, an address, a glob, a Site, or a list of these"

    def accepts(self, value: Any) -> bool:
        if isinstance(value, (str, Site)):
            return True
        if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
            return False
        return not isinstance(value, Collection) or (
            len(value) > 0 and all(isinstance(item, (str, Site)) for item in value)
        )


class Addresses:
    """Checks the sites that `wrap` takes."""

    words = "a mapping from address to pattern, or a list of Sites and addresses"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


SITES, ADDRESSES = Selects(), Addresses()
Selector = Annotated[str | Site | Iterable[str | Site], SITES]


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
            known = close_matches(index, self._by_name)
            raise UnknownSiteError(f"there is no site {index!r} in this table.", site=index, near=known)
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
        """Return the sites whose address matches a glob; `*` crosses dots, `[1]` is a path, not a set of letters."""
        match = _glob(pattern)
        return [site for site in self._sites if match(str(site))]

    def rows(self) -> list[dict[str, str]]:
        """Return the table as text, one dictionary per site: address, pattern, tags, depth, shape."""
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
    """Whether a selector may match many sites; `@*` alone means all calls of one."""
    return "*" in text.replace("@*", "") or "?" in text


def resolve(selector: Selector, table: SiteTable, modules: Mapping[str, nn.Module]) -> list[Site]:
    """Return the sites that an address, a glob, a tag, a Site, or several of these select, without duplicates.

    A glob searches the table and, if nothing there matches, the inputs and outputs of all modules. Sites
    found by a glob are optional: those that never fire are reported, and it is an error only if none of
    them fires.

    Raises:
        UnknownSiteError: nothing matches; similar names are listed.
        CompiledModelError: the site's module is inside a compiled or scripted one, where none can be found.
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
    what = "no site matches the glob" if is_glob(selector) else "there is no site"
    listed = f"There are {len(table)} listed sites (hooked.sites, or `maskhooks sites`)"
    listed += f" with the tags {', '.join(table.tags)}" if table.tags else ""
    if not len(table):
        listed = (
            "No sites are listed; list some: wrap(model, sites={'NAME:output': 'batch token hidden -> batch token'})"
        )
    raise UnknownSiteError(
        f"{what} {selector!r}. {listed}. The model has {len(modules)} modules, each with an input and an output.",
        site=selector,
        near=close_matches(selector, known),
    )


def _glob(pattern: str) -> Callable[[str], bool]:
    expression = re.compile(fnmatch.translate(pattern.replace("[", "[[]")))
    return lambda text: expression.match(text) is not None
