"""The reference has every public name; a built site, where there is one, has every page, and its links lead somewhere.

`make docs` builds the site; tests of what was built are skipped where it is not there, or older than the pages.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import maskhooks
from maskhooks import errors
from maskhooks.plugins.registry import registry
from tests.test_docs import PAGES, ROOT, blocks, name_of

SITE = ROOT / "site"
REFERENCE = ROOT / "docs" / "reference" / "api"


def path_of(found: Any) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def members(module: ModuleType, left_out: set[str]) -> Iterator[Any]:
    """The classes and functions that `automodule` shows: those defined there, with a docstring."""
    for name, found in vars(module).items():
        if inspect.isclass(found) or inspect.isfunction(found):
            own = found.__module__ == module.__name__ and not name.startswith("_") and name not in left_out
            if own and found.__doc__:
                yield found


@functools.cache
def entries() -> dict[str, Any]:
    """What the reference pages document, by path; each directive must lead to something."""
    found: dict[str, Any] = {}
    for page in sorted(REFERENCE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for kind, path, options in re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   :.*\n)*)", text, re.MULTILINE):
            if kind == "module":
                module = importlib.import_module(path)
                found[path] = module
                left_out = re.search(r":exclude-members: (.*)", options)
                for member in members(module, set(left_out[1].split(", ")) if left_out else set()):
                    found[path_of(member)] = member
            else:
                home, _, name = path.rpartition(".")
                found[path] = member = getattr(importlib.import_module(home), name)
                if kind in ("class", "function"):
                    found[path_of(member)] = member
    return found


def imported(code: str) -> Iterator[tuple[str, str]]:
    """The names that a program imports from maskhooks and the adapters that come with it."""
    ours = {path.stem for path in (ROOT / "adapters").iterdir()} | {"maskhooks"}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ours:
            for alias in node.names:
                yield node.module, alias.name


def public() -> dict[str, str]:
    """Every public name, as a path to a reason: what `maskhooks` exports, what pages and a plugin import, all parts."""
    found = {f"maskhooks.{name}": "exported" for name in maskhooks.__all__}
    exported = [getattr(maskhooks, name) for name in maskhooks.__all__]
    for name, error in vars(errors).items():
        if inspect.isclass(error) and error.__module__ == errors.__name__:
            found[path_of(error)] = f"the error {name}"
    programs = [(name_of(page), block.code) for page in PAGES for block in blocks(page) if block.kind == "python"]
    plugin = ROOT / "tests" / "plugins" / "example" / "maskhooks_example"
    programs += [(name_of(path), path.read_text(encoding="utf-8")) for path in plugin.glob("*.py")]
    for where, code in programs:
        for home, name in imported(code):
            if home == "maskhooks":
                continue
            thing = getattr(importlib.import_module(home), name, None)
            if thing in exported:
                continue
            if isinstance(thing, ModuleType) or thing is None:
                found[f"{home}.{name}"] = where
            else:
                own = inspect.isclass(thing) or inspect.isfunction(thing)
                found[path_of(thing) if own else f"{home}.{name}"] = where
    for kind in registry.kinds():
        if kind.type.__module__.startswith("maskhooks"):  # an optimizer is one of torch
            found[path_of(kind.type)] = "a kind of part"
        parts = registry.listed(kind) if kind.listed else registry.parts(kind).values()
        for part in (getattr(part, "__self__", part) for part in parts):  # of a classmethod that makes one, its class
            named = inspect.isclass(part) or inspect.isfunction(part)
            found[path_of(part if named else type(part))] = f"a {kind.name}"
    return found


def test_every_public_name_is_in_the_reference() -> None:
    missing = {path: why for path, why in public().items() if path not in entries()}
    assert missing == {}


def test_what_is_in_the_reference_has_a_docstring() -> None:
    silent = []
    for path, found in entries().items():
        if inspect.isclass(found):
            for name, member in vars(found).items():
                function = getattr(member, "__func__", getattr(member, "fget", None) or member)
                if name.startswith("_") or not inspect.isfunction(function):
                    continue
                inherited = (getattr(vars(base).get(name), "__doc__", None) for base in found.__mro__)
                text = next(filter(None, inherited), "")
                if not text or text.startswith("Define the computation performed"):  # torch's, of `forward`
                    silent.append(f"{path}.{name}")
        elif inspect.isfunction(found) or isinstance(found, ModuleType):
            silent += [] if found.__doc__ else [path]
    assert silent == [], silent


# What was built


class Page(HTMLParser):
    """What a page links to and loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        about = {key: value or "" for key, value in attributes}
        if "id" in about:
            self.anchors.add(about["id"])
        if tag == "a" and "href" in about:
            self.links.append(about["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in about:
            self.loads.append(about["src"])
        elif tag == "link" and about.get("rel") in ("stylesheet", "icon", "preload", "shortcut icon"):
            self.loads.append(about["href"])


@functools.cache
def built() -> dict[Path, Page]:
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install 'maskhooks[docs]'")
    inventory = SITE / "objects.inv"
    if not inventory.exists():
        pytest.skip("no site is built: run `make docs`")
    if any(path.stat().st_mtime > inventory.stat().st_mtime for path in (ROOT / "docs").rglob("*.md")):
        pytest.skip("the site is older than its pages: run `make docs`")
    return {path: Page(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}


def test_each_page_is_built() -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(SITE) for path in built()}
    assert len(pages) >= 40


def test_the_masks_of_the_tutorials_are_within_the_margin() -> None:
    built()
    for notebook in ("first-masks", "attention-heads"):
        assert "within the margin: True" in (SITE / "tutorials" / f"{notebook}.html").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_inventory() -> None:
    built()
    inventory = importlib.import_module("sphinx.util.inventory").InventoryFile.loads(
        (SITE / "objects.inv").read_bytes(), uri=""
    )
    names = {name for kind, items in inventory.data.items() if kind.startswith("py:") for name in items}
    assert set(public()) - names == set()


def test_nothing_is_loaded_from_elsewhere() -> None:
    loaded = {(str(path.relative_to(SITE)), load) for path, page in built().items() for load in page.loads}
    assert {one for one in loaded if re.match(r"(https?:)?//", one[1])} == set()
    sheets = [path for path in SITE.rglob("*.css") if re.search(r"url\(\s*['\"]?(https?:)?//", path.read_text("utf-8"))]
    assert sheets == []


def test_links_of_the_site_lead_somewhere() -> None:
    pages = built()
    broken = []
    for path, page in pages.items():
        if "_modules" in path.parts:  # source code, whose links back know one of the two names of a class
            continue
        for link in {*page.links, *page.loads}:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, _, anchor = urllib.parse.unquote(link.partition("?")[0]).partition("#")
            there = (path.parent / target).resolve() if target else path
            source = "_modules" in there.parts  # not all names have an anchor there
            known = anchor and there in pages and not source
            wrong = not there.exists() or (known and anchor not in pages[there].anchors)
            if wrong:
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == [], broken
