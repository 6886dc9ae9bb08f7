"""What stands around the code agrees with it: citation, workflow, forms, the page for contributors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def first(pattern: str, name: str) -> str:
    found = re.search(pattern, text(name), re.MULTILINE)
    assert found, f"{name} has no line {pattern}"
    return found[1]


def test_the_citation_has_the_package_version_and_licence() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    assert str(citation["version"]) == first(r'^version = "(.*)"$', "pyproject.toml")
    assert citation["license"] == first(r'^license = "(.*)"$', "pyproject.toml")


def test_the_citation_refers_to_the_paper_of_the_front_page() -> None:
    (paper,) = loaded(ROOT / "CITATION.cff")["references"]
    assert paper["title"] == first(r'^ *title = "(.*)",$', "README.md")
    assert paper["doi"] == first(r'^ *doi = "(.*)",$', "README.md")
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(authors) == first(r'^ *author = "(.*)",$', "README.md")


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = loaded(ROOT / ".github" / "workflows" / "check.yml")["jobs"]
    return found


def commands() -> list[list[str]]:
    """The words of each line that the workflow runs, once for each row of its matrix."""
    found = []
    for job in jobs().values():
        matrix = job.get("strategy", {}).get("matrix", {})
        rows = matrix.get("include") or [{axis: value} for axis, values in matrix.items() for value in values] or [{}]
        lines = "\n".join(step.get("run", "") for step in job["steps"])
        for row in rows:
            filled = lines
            for axis, value in row.items():
                filled = filled.replace(f"${{{{ matrix.{axis} }}}}", str(value))
            found += [line.split() for line in filled.splitlines() if line]
    return found


def test_the_workflow_runs_legs_and_targets_that_exist() -> None:
    there = set(first(r"^\[ \$# -gt 0 \] \|\| set -- (.*)$", ".ci/run").split())
    branches = set(re.findall(r"[\w-]+", " ".join(re.findall(r"^ +([\w| -]+)\) ", text(".ci/run"), re.MULTILINE))))
    legs = {leg for words in commands() if words[0] == ".ci/run" for leg in words[1:]}
    assert legs >= there, "the workflow leaves a leg out"
    assert legs <= branches, "the workflow runs a leg that .ci/run does not have"
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    assert {words[1] for words in commands() if words[0] == "make"} <= targets


def test_the_workflow_may_write_nothing_and_its_actions_are_pinned() -> None:
    workflow = loaded(ROOT / ".github" / "workflows" / "check.yml")
    assert workflow["permissions"] == {"contents": "read"}
    for job in jobs().values():
        assert "permissions" not in job
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v1"))


def test_the_oldest_python_is_the_one_of_the_package() -> None:
    oldest = first(r'^requires-python = ">=(.*)"$', "pyproject.toml")
    versions = [version for job in jobs().values() for version in str(job).split("'") if re.match(r"3\.\d+$", version)]
    assert min(versions, key=lambda version: int(version.split(".")[1])) == oldest


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_a_form_has_what_the_platform_asks_of_it(form: str) -> None:
    fields = loaded(FORMS / f"{form}.yml")
    assert fields["name"]
    assert fields["description"]
    names = [field["id"] for field in fields["body"] if field["type"] != "markdown"]
    assert names
    assert len(set(names)) == len(names)


def test_a_report_of_a_bug_has_what_we_need() -> None:
    required = {
        field["attributes"]["label"]
        for field in loaded(FORMS / "bug.yml")["body"]
        if field.get("validations", {}).get("required")
    }
    assert {"Output of `maskhooks doctor MODEL`", "Output of `maskhooks plugins`", "Versions"} <= required
    assert {"A minimal example", "What you expected"} <= required


def test_hooks_before_a_commit_are_checks_that_make_runs() -> None:
    (local,) = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    assert tools == {"ruff", "codespell", "mypy"}
    recipe = first(r"^check: .*\n((?:\t.*\n)+)", "Makefile")
    assert tools <= set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe))


def test_contributing_is_one_page() -> None:
    lines = text("CONTRIBUTING.md").splitlines()
    assert len(lines) <= 80
    assert sum(map(len, lines)) <= 6000


@pytest.mark.parametrize("partner", ["nnsight", "transformer-lens"])
def test_no_package_is_pinned_twice(partner: str) -> None:
    """A partner's environment has both files; pip refuses two versions."""
    pinned = re.compile(r"^([\w.-]+)==", re.MULTILINE)
    every, own = (
        {name.lower().replace("_", "-") for name in pinned.findall(text(file))}
        for file in ("constraints.txt", f"constraints-{partner}.txt")
    )
    assert own
    assert not every & own
