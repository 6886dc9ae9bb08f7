from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from maskhooks.viz.page import Example, page
from maskhooks.viz.table import table

ATTACK = "</script><script>document.title = 'run'</script>"
TOKENS = ["good", ATTACK, "<img src=x onerror=\"document.title='run'\">", "{{ 7 * 7 }}", " ", "\u2028"]
SCORES = np.array([[0.9, 1.0, 0.8, 0.7, 0.1, 0.2], [0.1234567, 0.0, 1.0, 0.5, np.nan, 0.95]])


@pytest.fixture
def text() -> str:
    examples = [
        Example(0, SCORES, TOKENS, {"prediction": ATTACK, "target": "negative"}),
        Example(7, SCORES[:, :2], ["a", "b"], {"prediction": "yes", "target": "yes"}),
        Example(8, np.full((2, 6), 0.25), [str(i) for i in range(6)], {}, width=3),
    ]
    return page(examples, ["0", "1"], title=ATTACK, note=ATTACK, provenance={"seed": ATTACK})


def data_of(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    result: dict[str, object] = json.loads(found[1])
    return result


def test_all_text_is_escaped(text: str) -> None:
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "&lt;/script&gt;" in text  # the title


def test_data_come_through_unchanged(text: str) -> None:
    data = data_of(text)
    assert data["rows"] == ["0", "1"]
    first = data["examples"][0]  # type: ignore[index]
    assert first["columns"] == TOKENS
    assert first["scores"][1] == [0.123, 0.0, 1.0, 0.5, None, 0.95]
    assert first["about"] == [["prediction", ATTACK], ["target", "negative"]]
    assert data["provenance"] == {"seed": ATTACK}


def test_the_page_stands_alone(text: str) -> None:
    assert "default-src 'none'" in text
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"https?:|\bsrc=|\bhref=|@import|url\(", outside)


def test_the_slider_is_labelled(text: str) -> None:
    assert '<label for="depth">Depth</label>' in text
    assert re.search(r'<input id="depth" type="range" min="0" max="1" step="1"\s+value="1">', text)


def test_a_page_without_examples() -> None:
    assert 'max="0"' in page([], [], title="nothing")


def test_a_hundred_examples_stay_small() -> None:
    example = Example(0, np.random.default_rng(0).random((8, 60)), ["token"] * 60, {})
    assert len(page([example] * 100, list("01234567"), title="many")) < 600_000


def in_browser(text: str, script: str, folder: Path) -> str:
    """The document after the page and one more script have run in headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=3000", "--window-size=1200,900", "--dump-dom", path.as_uri()],
        capture_output=True, timeout=120, check=True, encoding="utf-8",
    )  # fmt: skip
    return done.stdout


def test_the_slider_colours_tokens(text: str, tmp_path: Path) -> None:
    move = """
      const seen = {};
      const look = () => [...document.querySelectorAll("article:first-child .tokens span")].map(span =>
        span.classList.contains("none") ? null : Number(span.style.getPropertyValue("--score")));
      setTimeout(() => {
        seen.last = look();
        seen.shown = shown.textContent;
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        seen.first = look();
        seen.now = document.querySelector("figure li.now").textContent;
        seen.spoken = slider.getAttribute("aria-valuetext");
        const span = document.querySelector(".tokens span"), canvas = document.querySelector("canvas");
        span.dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
        seen.tip = tip.textContent;
        const box = canvas.getBoundingClientRect();
        const at = { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 };
        canvas.dispatchEvent(new PointerEvent("pointermove", at));
        seen.cell = tip.textContent;
        canvas.dispatchEvent(new MouseEvent("click", at));
        seen.clicked = slider.value;
        seen.tokens = [...views.values()][0].spans.map(span => span.textContent);
        seen.differs = [...document.querySelectorAll("article")].map(a => a.classList.contains("differs"));
        seen.canvases = document.querySelectorAll("canvas").length;
        seen.patches = document.querySelector(".patches").style.gridTemplateColumns;
        seen.title = document.title;
        seen.images = document.querySelectorAll("img").length;
        document.body.replaceChildren(JSON.stringify(seen));
      }, 500);
    """
    dom = in_browser(text, move, tmp_path)
    found = re.search(r"<body>(.*)</body>", dom, re.DOTALL)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["last"] == [0.123, 0, 1, 0.5, None, 0.95]
    assert seen["first"] == [0.9, 1, 0.8, 0.7, 0.1, 0.2]
    assert (seen["shown"], seen["now"], seen["spoken"]) == ("1 of 1", "0", "depth 0")
    assert seen["tip"] == "good   depth 0   P(kept) 0.900"
    assert seen["cell"] == "good   depth 1   P(kept) 0.123"
    assert seen["clicked"] == "1"
    assert seen["tokens"][:5] == [*TOKENS[:4], "␣"]
    assert seen["differs"] == [True, False, False]
    assert seen["canvases"] == 2  # patches have none
    assert seen["patches"] == "repeat(3, 18px)"
    assert seen["title"] == ATTACK  # no script from the data has run
    assert seen["images"] == 0


def test_a_frame_shows_the_page(text: str, tmp_path: Path) -> None:
    frame = f'<!DOCTYPE html><body><iframe sandbox="allow-scripts" srcdoc="{html.escape(text)}"></iframe></body>'
    script = """
      addEventListener("message", event => { document.body.textContent = "cards: " + event.data; });
    """
    speak = "<script>parent.postMessage(document.querySelectorAll('article').length, '*')</script></body>"
    frame = frame.replace(html.escape("</body>"), html.escape(speak))
    assert "cards: 3" in in_browser(frame, script, tmp_path)


def test_table_is_escaped_and_short() -> None:
    text = table([[0.25, np.nan, 1.0]], ["<0>"], ["<a>", "b", "c"], caption="<c>", most=2)
    assert "<a>" not in text
    assert "&lt;a&gt;" in text
    assert "&lt;0&gt;" in text
    assert "1 more" in text
    assert 'title="0.250"' in text
