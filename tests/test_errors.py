"""The tree of errors, and its pages: what a page says is what happens, and its way out works."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from maskhooks import errors
from maskhooks.errors import MaskhooksError, MaskhooksWarning, UnknownNameError, UnknownSiteError, close_matches

PAGES = Path(__file__).parent.parent / "docs" / "reference" / "errors"
CLASSES = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, (MaskhooksError, MaskhooksWarning))
}


def page_of(name: str) -> Path:
    return PAGES / (re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower() + ".md")


def test_every_class_has_a_page_and_every_page_a_class() -> None:
    pages = {path.name for path in PAGES.glob("*.md")}
    assert pages - {"index.md"} == {page_of(name).name for name in CLASSES}
    listed = re.findall(
        r"^ *- \[(\w+)\]\(([\w-]+\.md)\)", (PAGES / "index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert dict(listed) == {name: page_of(name).name for name in CLASSES}


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = [
        (line.index(match[0]), match[0])
        for line in (errors.__doc__ or "").splitlines()
        if (match := re.search(r"\w+(Error|Warning)\b", line)) and not line.startswith("E")
    ]
    parents: list[tuple[int, str]] = []
    for indent, name in drawn:
        parents = [(at, parent) for at, parent in parents if at < indent]
        if parents:
            assert CLASSES[parents[-1][1]] in CLASSES[name].__bases__, name
        parents.append((indent, name))
    assert sorted(name for _, name in drawn) == sorted(CLASSES)


def run(code: str, space: dict[str, Any]) -> Warning | MaskhooksError | None:
    """What a code block ends with: an error of ours, the first warning of ours, or nothing."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(None):
        warnings.simplefilter("always")
        try:
            exec(compile(code, "<page>", "exec"), space)
        except MaskhooksError as error:
            return error
    ours = [found.message for found in caught if isinstance(found.message, MaskhooksWarning)]
    return ours[0] if ours else None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CLASSES)
def test_a_page_tells_the_truth(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block ends with the message shown (`...` stands for what varies), the second with none."""
    text = page_of(name).read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    ((symptom,), (bad, good)) = (re.findall(rf"```{kind}\n(.*?)\n```", text, re.DOTALL) for kind in ("text", "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distributions", importlib.metadata.distributions)
    space: dict[str, Any] = {"__name__": "page"}
    found = run(bad, space)
    assert isinstance(found, CLASSES[name])
    pattern = ".*?".join(re.escape(part) for part in symptom.split("..."))
    assert re.fullmatch(pattern, f"{type(found).__name__}: {found}", re.DOTALL), f"{type(found).__name__}: {found}"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(good, space) is None


def test_links_between_pages_lead_somewhere() -> None:
    for path in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([\w-]+\.md)\)", path.read_text(encoding="utf-8")):
            assert (PAGES / target).exists(), f"{path.name}: {target}"


def test_near() -> None:
    names = ["encoder.layer.0", "encoder.layer.1", "decoder", "head"]
    assert close_matches("encoder.layr.1", names)[0] == "encoder.layer.1"
    assert sorted(close_matches("layer", names)) == ["encoder.layer.0", "encoder.layer.1"]
    assert close_matches("qqqq", names) == []
    assert close_matches("", names) == []


def test_near_names_are_in_the_message() -> None:
    error = UnknownSiteError("no site 'hed'.", site="hed", near=["head", "seed"])
    assert str(error) == "no site 'hed'. Did you mean 'head', 'seed'?"
    assert (error.site, error.near) == ("hed", ["head", "seed"])
    assert str(UnknownNameError("none.", plugin="x")) == "none."


def test_a_missing_extra_prints_the_pip_line() -> None:
    error = errors.MissingExtraError("captum", "captum", "This attribution")
    assert "pip install 'maskhooks[captum]'" in str(error)
    assert error.plugin == "captum"


def test_errors_carry_their_objects() -> None:
    assert errors.SiteNeverFiredError("x", sites=["a", "b"]).site == "a"
    assert errors.SiteNeverFiredError("x").site is None
    assert errors.ModelError("x", module="m").module == "m"
    assert errors.NonFiniteError("x", site="s").site == "s"
    assert errors.StorageError("x", path="p").path == "p"
    assert errors.FingerprintError("x", differences=["d"]).differences == ["d"]
    assert issubclass(errors.SettingError, ValueError)
