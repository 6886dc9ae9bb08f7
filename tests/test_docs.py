"""What the documents say is so: their code runs and prints what they show, links lead somewhere, lists are complete.

The pages under docs/reference/errors are run by test_errors.py.

In a page, a comment directly above a code block says how it is meant:

- `<!-- no-run: reason -->` above a block marked `python no-run`: it is compiled only;
- `<!-- prints -->`: this is what the python block before it prints, where `...` stands for anything;
- `<!-- file: path -->`: this is a file of the repository, word for word. `python -m tests.test_docs` copies them anew.

`{code-cell}` blocks belong to notebooks, the pages under docs/tutorials. The build of the site runs them (`make docs`),
and an error there ends it; here they are only compiled.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

import maskhooks
from maskhooks.cli.app import app
from maskhooks.plugins import hookspecs

ROOT = Path(__file__).parent.parent
ALL = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *ROOT.glob("docs/**/*.md"),
]
PAGES = sorted(page for page in ALL if page.parent.name != "errors")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and marks, its code, the line it begins at, and the comment above it."""

    kind: str
    code: str
    line: int
    comment: str


@functools.cache
def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    comment, inside, begun, code = "", "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if begun:
            if line == "```":
                found.append(Block(inside, "".join(code), begun, comment))
                begun, comment = 0, ""
            else:
                code.append(f"{line}\n")
        elif line.startswith("```"):
            inside, begun, code = line.removeprefix("```"), number, []
        elif match := re.fullmatch(r"<!-- (.*) -->", line):
            comment = match[1]
        elif line:
            comment = ""
    assert not begun, f"{page}: the block at line {begun} does not end"
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_code(page: Path) -> bool:
    return any(block.kind.startswith("python") for block in blocks(page))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("page", list(filter(with_code, PAGES)), ids=name_of)
def test_code_runs_and_prints_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share names, as in one session, and an empty folder to write to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))  # where classes of the page live
    space: dict[str, Any] = vars(sys.modules["page"])
    printed = ""
    code = "".join(block.code for block in blocks(page) if block.kind == "python")
    for library, used in (
        ("captum", r"(?:import|from) (?:maskhooks_)?captum\b"),
        ("scipy", r"(?:from maskhooks\.metrics\.intervals|.*\bmaskhooks\.compare)\b"),
    ):
        if re.search(f"^{used}", code, re.MULTILINE):  # not everyone installs it
            pytest.importorskip(library)
    for block in blocks(page):
        if block.comment == "prints":
            assert matches(block.code, printed), f"{name_of(page)}, line {block.line} shows not:\n{printed}"
        if not block.kind.startswith("python") or block.comment.startswith("file: "):
            continue
        code = compile("\n" * block.line + block.code, str(page), "exec")
        if block.kind == "python no-run":
            assert re.fullmatch("no-run: .{10,}", block.comment), f"{name_of(page)}, line {block.line}: why?"
            continue
        assert block.kind == "python", f"{name_of(page)}, line {block.line}: {block.kind!r}"
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, space)
        printed = out.getvalue()


def matches(shown: str, printed: str) -> bool:
    """Whether a text was printed, but for what `...` stands for and blanks at the ends of lines."""
    pattern = ".*?".join(re.escape(part) for part in shown.strip().split("..."))
    text = "\n".join(line.rstrip() for line in printed.strip().splitlines())
    return re.fullmatch(pattern, text, re.DOTALL) is not None


def test_files_shown_are_the_files() -> None:
    shown = [(page, block) for page in PAGES for block in blocks(page) if block.comment.startswith("file: ")]
    assert shown
    for page, block in shown:
        path = ROOT / block.comment.removeprefix("file: ")
        assert block.code == path.read_text(encoding="utf-8"), f"{name_of(page)} shows an old {path.name}"


def copy_files() -> None:
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
        for block in reversed(blocks(page)):
            if block.comment.startswith("file: "):
                path = ROOT / block.comment.removeprefix("file: ")
                lines[block.line : block.line + block.code.count("\n")] = [path.read_text(encoding="utf-8")]
        page.write_text("".join(lines), encoding="utf-8")


def test_the_example_plugin_is_shown_whole() -> None:
    """All its files but the library that it serves: one explainer on a page of its own, the rest on another."""
    folder = ROOT / "tests" / "plugins" / "example"
    files = {
        str(path.relative_to(ROOT))
        for path in (folder / "pyproject.toml", *folder.glob("maskhooks_example/*.py"))
        if path.name not in ("__init__.py", "pyramid.py")
    }
    pages = [ROOT / "docs" / "how-to" / name for name in ("write-an-adapter.md", "write-an-explainer.md")]
    assert {block.comment.removeprefix("file: ") for page in pages for block in blocks(page)} >= files


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted(ALL), ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}, which is not there"
        assert target.is_relative_to(ROOT), f"{name_of(page)} links to {link}, outside of the repository"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {link}: no such heading"


def test_every_page_is_reached_from_the_index() -> None:
    """Within two links: the index leads to the page itself, or to the index of its folder. Lists of pages are whole."""
    index = ROOT / "docs" / "index.md"

    def led_to(page: Path) -> set[Path]:
        return {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if not link.startswith("#")}

    first = led_to(index)
    reached = first | {page for near in first if near.name == "index.md" for page in led_to(near)}
    reached |= {
        page for near in reached if near.name == "index.md" for page in led_to(near)
    }  # pages of errors, the API
    pages = {page for page in ALL if page.is_relative_to(index.parent)} - {index}
    assert {name_of(page) for page in pages - reached} == set()


def test_every_page_is_in_the_navigation() -> None:
    for index in ROOT.glob("docs/**/index.md"):
        (tree,) = (block.code for block in blocks(index) if block.kind == "{toctree}")
        entries = {re.sub(r".*<(.*)>", r"\1", line) for line in tree.splitlines() if line and not line.startswith(":")}
        if "*" not in entries:
            pages = {page.stem for page in index.parent.glob("*.md")} - {"index"}
            pages |= {f"{page.parent.name}/index" for page in index.parent.glob("*/index.md")}
            assert entries == pages, name_of(index)


def test_notebooks_are_python() -> None:
    notebooks = [page for page in PAGES if page.read_text(encoding="utf-8").startswith("---\nfile_format: mystnb")]
    assert len(notebooks) >= 2
    for page in PAGES:
        cells = [block for block in blocks(page) if block.kind.startswith("{code-cell}")]
        assert bool(cells) == (page in notebooks), (
            f"{name_of(page)}: cells run only in a page that begins as a notebook"
        )
        for cell in cells:
            code = "".join(line for line in cell.code.splitlines(True) if not line.startswith((":", "%")))
            compile(code, str(page), "exec")


def test_each_hook_has_a_heading_and_a_block() -> None:
    page = ROOT / "docs" / "reference" / "plugin-hooks.md"
    specs = {name for name in vars(hookspecs) if name.startswith("maskhooks_")}
    headings = set(re.findall(r"^## `(\w+)`$", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert headings == specs
    code = "".join(block.code for block in blocks(page) if block.kind == "python")
    assert set(re.findall(r"def (maskhooks_\w+)", code)) == specs


def test_every_public_name_is_in_the_documents() -> None:
    written = [page for page in PAGES if "api" not in page.parts]  # that every name is in the reference is test_site's
    words = {word for page in written for word in re.findall(r"\w+", page.read_text(encoding="utf-8"))}
    assert set(maskhooks.__all__) - words == set()


def test_the_design_has_the_layers_and_the_packages() -> None:
    """The layers are the contract's; the tables hold every package, and none that is neither there nor planned."""
    page = ROOT / "docs" / "explanation" / "design.md"
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    layers = contract["importlinter:contract:layers"]["layers"].strip()
    texts = [block.code for block in blocks(page) if block.kind == "text"]
    assert [line.split() for line in layers.splitlines()] in [
        [line.split()[1:] for line in text.splitlines()] for text in texts
    ]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|(?: (.*?))? \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    there = {
        path.stem: path
        for root in ("maskhooks", "adapters")
        for path in (ROOT / root).iterdir()
        if (path.suffix == ".py" and not path.name.startswith("__")) or (path / "__init__.py").exists()
    }
    planned = {name for name, what, _ in rows if what.startswith("*planned*")}
    assert {name for name, *_ in rows} - planned == set(there)
    assert planned & set(there) == set()
    for name, _, first in rows:
        for module in re.findall(r"`(\w+)`", first):
            assert (there[name] / f"{module}.py").exists(), f"{name} has no module {module}"


def test_few_files_stand_beside_the_packages_and_none_has_a_public_name() -> None:
    """`maskhooks.report` is a function, so that no module can have its name."""
    beside = {path.stem for path in (ROOT / "maskhooks").iterdir() if path.suffix == ".py"}
    assert len(beside) <= 12
    packages = {path.parent.name for path in (ROOT / "maskhooks").glob("*/__init__.py")}
    assert set(maskhooks.__all__) & (beside | packages) == set()


def shell_lines() -> list[tuple[Path, list[str]]]:
    return [
        (page, line.split("#")[0].split())
        for page in PAGES
        for block in blocks(page)
        if block.kind == "bash"
        for line in block.code.replace("\\\n", " ").splitlines()
    ]


def test_commands_and_options_shown_exist() -> None:
    commands: Any = getattr(typer.main.get_command(app), "commands")  # noqa: B009 # a group's own
    shown = [(page, words[1:]) for page, words in shell_lines() if words[:1] == ["maskhooks"]]
    for page, (command, *words) in shown:
        where = f"{name_of(page)}: maskhooks {command}"
        if command.startswith("-"):
            continue
        assert command in commands, where
        options = {option for parameter in commands[command].params for option in parameter.opts}
        given = {word for word in words if word.startswith("--")}
        assert given <= options, f"{where}: {given - options}"
    guide = ROOT / "docs" / "reference" / "command-line.md"
    headings = set(re.findall(r"^## `maskhooks (\w+)`", guide.read_text(encoding="utf-8"), re.MULTILINE))
    assert headings == set(commands)


def test_targets_and_versions_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    lines = shell_lines()
    targets = {words[1] for _, words in lines if words[:1] == ["make"]}
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    versions = {word for _, words in lines if words[:1] == ["pip"] for word in words if "==" in word}
    assert versions
    assert versions <= set(pins)


if __name__ == "__main__":
    copy_files()
