"""The whole page: of a run, of explanations in memory and in files, of both."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import maskhooks
from maskhooks.errors import CorruptFileError, SettingError, StorageError
from maskhooks.explanations.analyses import kept_by
from maskhooks.explanations.explanation import Explanation, Scores
from maskhooks.explanations.shards import Shards
from maskhooks.reports.run_page import Rows, is_run, report, rows_at
from maskhooks.sites.example_index import ExampleIndex
from maskhooks.sites.site import Site
from tests.viz.browser import seen_in_browser

ATTACKS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script>", "<!--", "&lt;b&gt;"]
PATTERN = "batch token hidden -> batch token"


class Page(HTMLParser):
    """The tags of a page, what is written between them, and the block of JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data: Any = None
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = "json" if dict(attributes).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "json":
            self.data = json.loads(data)
        elif self.inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def explanation(count: int = 3, first: int = 0, words: list[str] | None = None) -> Explanation:
    names = [["[CLS]", *(words or ["a", "##b", "."])]] * count
    shape = (count, len(names[0]))
    generator = torch.Generator().manual_seed(first)
    parts = [
        Scores(
            Site.parse(f"layer.{depth}:output", PATTERN),
            depth,
            torch.rand(shape, generator=generator),
            torch.ones(shape, dtype=torch.bool),
            names,
        )
        for depth in range(2)
    ]
    known = [{"prediction": "yes" if index % 2 else "no", "target": "no"} for index in range(first, first + count)]
    return Explanation.build(parts, provenance={"seed": 7}, metadata=known, start_index=first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Explanation]:
    """A folder of a run, and what its masks say of a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    hooked = maskhooks.wrap(
        model,
        sites={"0:output": PATTERN},
        output=lambda logits: Categorical(logits=logits),
        names=lambda batch: [ATTACKS[:3]] * len(batch),
    )
    batches = [torch.randint(10, (8, 3)) for _ in range(3)]
    folder = tmp_path_factory.mktemp("runs") / "run"
    explainer = maskhooks.DiffMask(hooked, margin=5.0)
    explainer.fit(batches, validation=batches[:1], steps=8, run_dir=folder, progress=False, accelerator="cpu")
    return folder, explainer.explain_all(batches)


def test_a_run_and_its_explanation(trained: tuple[Path, Explanation], tmp_path: Path) -> None:
    folder, explained = trained
    text = report(folder, explained, tmp_path / "report.html", max_examples=5, min_count=2)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    assert headings(text)[:3] == ["What this is about", "How the masks were trained", "What is kept at each depth"]
    assert headings(text)[-1] == "Examples"
    page = Page(text)
    for told in (
        "Sequential",
        "all 8 steps were done",
        "24 examples; the first 5 are below",
        "5 nats on average, met by all masks",
        "diffmask",
        "stable",
        "chosen: step",
    ):
        assert told in page.text, told
    assert "did not make the explanation" not in page.text
    assert len(page.data["examples"]) == 5
    assert page.data["provenance"]["margin"] == 5
    validations = len((folder / "validation.csv").read_text().splitlines()) - 1
    assert [tag for tag, _ in page.tags].count("circle") == 2 * validations > 0


def test_all_text_is_escaped_and_nothing_is_loaded(trained: tuple[Path, Explanation]) -> None:
    folder, explained = trained
    text = report(folder, explained, min_count=1, title=ATTACKS[0])
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action", "onerror", "onload", "onclick"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for attack in ATTACKS[:3]:
        assert attack in [word.strip() for word in page.words], attack  # in the table of tokens, as text
        assert attack in page.data["examples"][0]["columns"]


def test_a_token_that_tries_to_be_a_script_is_seen_and_does_not_run(tmp_path: Path) -> None:
    text = report(None, explanation(words=ATTACKS), min_count=1)
    look = """
      seen.shown = [...document.querySelectorAll("article:first-child .tokens span")].map(span => span.textContent);
      seen.bars = [...document.querySelectorAll(".bars tbody th")].map(head => head.firstChild.textContent.trim());
      seen.images = document.querySelectorAll("img").length;
      seen.scripts = document.querySelectorAll("script").length;
    """
    alert = "<head><script>window.alert = () => { document.title = 'run'; };</script>"
    seen = seen_in_browser(text.replace("<head>", alert, 1), look + "seen.title = document.title;", tmp_path)
    assert seen["shown"] == ["[CLS]", *ATTACKS]
    assert set(ATTACKS) <= set(seen["bars"])
    assert (seen["images"], seen["scripts"]) == (0, 4)  # two of the page, and two of this test
    assert seen["title"] == "Which positions does the prediction need?"


def test_a_report_in_a_browser(trained: tuple[Path, Explanation], tmp_path: Path) -> None:
    look = """
      const marks = () => [...document.querySelectorAll("article:first-child .tokens span")]
        .map(span => Number(span.style.getPropertyValue("--score")));
      seen.deep = marks();
      slider.value = 0;
      slider.dispatchEvent(new Event("input"));
      seen.low = marks();
      search.value = "yes";
      search.dispatchEvent(new Event("input"));
      seen.listed = [...document.querySelectorAll("article:not([hidden]) h3")].map(node => node.textContent);
      seen.found = document.getElementById("found").textContent;
      seen.asked = performance.getEntriesByType("resource").length;
      seen.drawn = [...document.querySelectorAll("svg polyline")].filter(line => line.getBBox().width > 50).length;
      seen.wide = document.documentElement.scrollWidth <= innerWidth;
    """
    explained = explanation()
    seen = seen_in_browser(report(trained[0], explained), look, tmp_path)
    scores = explained.matrix(0)[0].round(3)
    np.testing.assert_allclose([seen["low"], seen["deep"]], scores, atol=1e-6)
    assert (seen["listed"], seen["found"]) == (["Example 1"], "1 of 3")
    assert (seen["asked"], seen["drawn"], seen["wide"]) == (0, 6, True)


def test_a_run_alone_also_while_it_goes_on(trained: tuple[Path, Explanation], tmp_path: Path) -> None:
    whole = report(trained[0])
    assert headings(whole) == ["What this is about", "How the masks were trained", "Examples"]
    assert 'id="examples" hidden' in whole
    going = tmp_path / "going"
    (going / "state").mkdir(parents=True)
    (going / "log.csv").write_bytes((trained[0] / "log.csv").read_bytes())
    for state in (trained[0] / "state").iterdir():
        (going / "state" / state.name).write_bytes(state.read_bytes())
    page = Page(report(going))
    assert "in progress or interrupted" in page.text
    assert "5 nats on average" in page.text
    assert "no validation data" in page.text
    (going / "log.csv").unlink()
    assert not is_run(going)
    with pytest.raises(CorruptFileError, match=r"neither explainer\.json nor log\.csv. Give the folder that fit"):
        report(going)


def test_an_explanation_of_another_run_is_told(trained: tuple[Path, Explanation]) -> None:
    assert "this run did not make the explanation; they differ in" in Page(report(trained[0], explanation())).text


def test_files_folders_and_shards_give_the_same_page(tmp_path: Path) -> None:
    parts = [explanation(3, first) for first in (0, 3, 6)]
    whole = Explanation.concat(parts)
    expected = report(None, whole, min_count=1)
    (tmp_path / "explained").mkdir()
    whole.to_parquet(tmp_path / "explained" / "explanation.parquet")
    whole.save(tmp_path / "saved")
    shards = Shards.open(tmp_path / "shards", {})
    for number, part in enumerate(parts):
        shards.write(number, part)
    shards.finish(3, 9)
    places: list[Any] = [
        tmp_path / "explained" / "explanation.parquet",
        tmp_path / "explained",
        str(tmp_path / "saved"),
        tmp_path / "shards",
        shards,
        parts,
    ]
    assert [report(None, place, min_count=1) == expected for place in places] == [True] * 6
    assert rows_at(tmp_path / "explained") == tmp_path / "explained" / "explanation.parquet"
    assert rows_at(tmp_path) is None


def test_a_long_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = explanation(9)
    whole.to_parquet(tmp_path / "whole.parquet")
    expected = report(None, whole, min_count=1, max_examples=4)
    monkeypatch.setattr(sys.modules["maskhooks.reports.run_page"], "_ROWS", 20)
    sizes = [len(part) for part in Rows(tmp_path / "whole.parquet")]
    assert sizes == [24, 16, 16, 16]
    assert report(None, tmp_path / "whole.parquet", min_count=1, max_examples=4) == expected


def test_patches_have_no_words() -> None:
    site = Site.parse("conv:output", "batch channel height width -> batch height width")
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    text = report(None, Explanation.build([Scores(site, 0, torch.rand(2, 2, 3), valid)], provenance={}))
    assert headings(text) == ["What this is about", "What is kept at each depth", "Examples"]
    assert Page(text).data["examples"][0]["width"] == 3


def test_edges_have_no_words_and_the_target_is_that_of_their_graph() -> None:
    site, graphs = Site.parse("conv.message:output", "edge feature -> edge"), 8
    ends = {name: torch.arange(4 * graphs) % (3 + shift) for shift, name in enumerate(("source", "target"))}
    whose = ExampleIndex(torch.arange(graphs).repeat_interleave(4), graphs)
    rows = Scores(site, 0, torch.rand(4 * graphs), torch.ones(4 * graphs).bool(), None, whose, ends)
    about = [{"prediction": "a", "target": "xy"[number % 2]} for number in range(graphs)]
    made = Explanation.build([rows], provenance={}, metadata=about)
    text = report(None, made)
    assert headings(text) == ["What this is about", "What is kept at each depth", "By target", "Examples"]
    assert {row.group for row in kept_by(made, "target")} == {"x", "y"}


def test_answers_that_are_free_text_group_nothing() -> None:
    many = explanation(50)
    assert "By prediction and by target" not in headings(report(None, many))  # there is one target
    assert "By prediction" in headings(report(None, many))
    told = {number: {"prediction": f"answer {number}"} for number in range(50)}
    assert headings(report(None, replace(many, metadata=told)))[-2:] == ["By token", "Examples"]
    assert headings(report(None, replace(many, metadata={})))[-2:] == ["By token", "Examples"]


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nothing to report\. Give the folder of a run"):
        report()
    with pytest.raises(SettingError, match="no rows with a valid position"):
        report(None, explanation().select(valid=False))
    with pytest.raises(SettingError, match="examples 2 to 4 come twice"):
        report(None, [explanation(3), explanation(3, 2)])
    with pytest.raises(SettingError, match="examples 0 to 9 come twice"):
        report(None, [explanation(3, 2), explanation(10)])
    with pytest.raises(CorruptFileError, match=r"does not hold an explanation\. Give a Parquet file"):
        report(None, tmp_path)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(CorruptFileError, match=r"text\.parquet is not a saved explanation"):
        report(None, tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        report(None, explanation(), tmp_path / "nowhere" / "report.html")
