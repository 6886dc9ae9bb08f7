"""The page of an explanation: its texts, data, slider, search and sections, also in a browser."""

from __future__ import annotations

import html
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from maskhooks.viz.chart import Point, chart
from maskhooks.viz.page import Example, page
from maskhooks.viz.sections import Bar, Bars, Cell, ChartRow, Charts, Grid, Section, Table
from maskhooks.viz.table import table
from tests.viz.browser import in_browser, seen_in_browser

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
    assert first["metadata"] == [["prediction", ATTACK], ["target", "negative"]]
    assert data["provenance"] == {"seed": ATTACK}


def test_the_page_stands_alone(text: str) -> None:
    assert "default-src 'none'" in text
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"https?:|\bsrc=|\bhref=(?!\"#)|@import|url\(", outside)


def test_the_slider_is_labelled(text: str) -> None:
    assert '<label for="depth">Depth</label>' in text
    assert re.search(r'<input id="depth" type="range" min="0" max="1" step="1"\s+value="1">', text)


def test_a_page_without_examples() -> None:
    assert 'max="0"' in page([], [], title="nothing")


def test_a_hundred_examples_stay_small() -> None:
    example = Example(0, np.random.default_rng(0).random((8, 60)), ["token"] * 60, {})
    assert len(page([example] * 100, list("01234567"), title="many")) < 600_000


def test_the_slider_colours_tokens(text: str, tmp_path: Path) -> None:
    move = """
      const look = () => [...document.querySelectorAll("article:first-child .tokens span")].map(span =>
        span.classList.contains("none") ? null : Number(span.style.getPropertyValue("--score")));
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
      seen.kept = [...document.querySelectorAll("article:first-child .kept")].map(span => span.textContent);
    """
    seen = seen_in_browser(text, move, tmp_path)
    assert seen["kept"] == [TOKENS[2], TOKENS[5]]  # above one half at the depth clicked on
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


def test_totals_stand_beside_depths(tmp_path: Path) -> None:
    words = Example(0, [[10.0, 5.0], [3.0, 0.0]], ["a", "b"], {}, totals=[15.0, 3.0])
    patches = Example(1, np.full((2, 4), 4.0), list("0123"), {}, width=2, totals=[1600.0, -8.0])
    text = page([words, patches], ["0", "1"], title="x", top=10.0, threshold=None, unit="bits")
    assert "an underlined" not in text
    look = """
      const all = (selector, what) => [...document.querySelectorAll(selector)].map(what);
      seen.totals = all(".totals", list => [...list.children].map(one => one.textContent));
      seen.lengths = all(".totals i", bar => Math.round(bar.getBoundingClientRect().width));
      const rows = all("article:first-child li", row => row.getBoundingClientRect().y);
      seen.level = rows[0] === rows[2] && rows[1] === rows[3];
      seen.canvases = document.querySelectorAll("canvas").length;
      seen.kept = document.querySelectorAll(".kept").length;
      [...document.querySelectorAll("article:last-child figure ol:first-child li")].at(-1)
        .dispatchEvent(new MouseEvent("click", { bubbles: true }));
      seen.clicked = slider.value;
    """
    seen = seen_in_browser(text, look, tmp_path)
    assert seen["totals"] == [["3 bits in all", "15 bits in all"], ["-8 bits in all", "1,600 bits in all"]]
    assert seen["lengths"] == [22, 110, 1, 110]
    assert (seen["level"], seen["canvases"], seen["kept"], seen["clicked"]) == (True, 1, 0, "0")


SECTIONS = [
    Section(
        ATTACK,
        ATTACK,
        [
            Table([(ATTACK, ATTACK)]),
            Bars([Bar(ATTACK, 0.25, ATTACK, ATTACK), Bar("b", -0.5, "-1")], (ATTACK, ATTACK), ATTACK),
            Grid(ATTACK, [(ATTACK, ATTACK)], [ATTACK, "b"], [[Cell(0.5, ATTACK)], [Cell(None)]]),
            Grid("", [("a", ""), ("b", "")], ["c"], [[Cell(-0.25, "", "-2"), Cell(1.0, "", ATTACK)]]),
            Charts(
                (ATTACK,),
                [
                    ChartRow(
                        ATTACK,
                        ATTACK,
                        False,
                        [chart(ATTACK, [0], [1], last=1, top=1.0, marks=[Point(0.0, 1.0, ATTACK)])],
                    )
                ],
            ),
        ],
    )
]


def test_sections_are_escaped_and_stand_alone() -> None:
    text = page([], [], title="x", sections=SECTIONS)
    assert text.count("<script") == text.count("</script>") == 2
    assert text.count("&lt;/script&gt;") == 2 * 23
    assert '<i class="below" style="width:50.0%"' in text
    assert re.search(r'<td class="below" style="--score:0.25" title="">-2</td>', text)
    assert re.search(r'<section class="examples" id="examples" hidden>', text)
    assert 'style="width:25.0%"' in text
    assert '<td style="--score:0.5"' in text


def test_a_search_lists_what_has_all_its_words(text: str, tmp_path: Path) -> None:
    look = """
      const field = document.getElementById("search");
      const listed = words => {
        field.value = words;
        field.dispatchEvent(new Event("input"));
        return [[...document.querySelectorAll("article")].filter(card => card.checkVisibility())
          .map(card => card.querySelector("h3").textContent), document.getElementById("found").textContent];
      };
      seen.token = listed("  GOOD ");
      seen.marked = [...document.querySelectorAll(".hit")].map(node => node.textContent);
      seen.about = listed("yes b");
      seen.script = listed("<script>");
      seen.number = listed("example 8");
      seen.nothing = listed("good yes nowhere");
      const press = (key, on) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      press("Escape", field);
      seen.escaped = [field.value, document.querySelectorAll("article:not([hidden])").length];
      seen.before = document.activeElement === field;
      press("/", document.body);
      seen.after = document.activeElement === field;
    """
    seen = seen_in_browser(text, look, tmp_path)
    assert seen["token"] == [["Example 0"], "1 of 3"]
    assert seen["marked"] == ["good"]
    assert seen["about"] == [["Example 7"], "1 of 3"]
    assert seen["script"] == [["Example 0"], "1 of 3"]
    assert seen["number"] == [["Example 8"], "1 of 3"]
    assert seen["nothing"] == [[], "0 of 3"]
    assert seen["escaped"] == ["", 3]
    assert (seen["before"], seen["after"]) == (False, True)


def test_a_search_finds_words_in_pieces(tmp_path: Path) -> None:
    pieces = [["un", "##believ", "##able"], ["\u0120un", "believ", "able"], ["\u2581not", "\u2581it"]]
    examples = [Example(number, [[1.0] * len(labels)], labels, {}) for number, labels in enumerate(pieces)]
    look = """
      search.value = "unbelievable";
      filter();
      seen.listed = [...document.querySelectorAll("article:not([hidden]) h3")].map(node => node.textContent);
    """
    assert seen_in_browser(page(examples, ["0"], title="x"), look, tmp_path)["listed"] == ["Example 0", "Example 1"]


class Server(ThreadingHTTPServer):
    """Counts the requests that reach it."""

    requests = 0


class Count(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests += 1  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_page_reaches_no_network(text: str, tmp_path: Path) -> None:
    """It asks for nothing, and what a script of a stranger asks for is refused; without its policy it would get out."""
    with Server(("127.0.0.1", 0), Count) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        look = f"""
          seen.asked = performance.getEntriesByType("resource").length;
          const image = new Image();
          image.src = "http://127.0.0.1:{server.server_port}/image";
          document.body.append(image);
          await fetch("http://127.0.0.1:{server.server_port}/data", {{ mode: "no-cors" }}).catch(() => 0);
          await image.decode().catch(() => 0);
        """
        assert seen_in_browser(text, look, tmp_path)["asked"] == 0
        assert server.requests == 0
        seen_in_browser(re.sub(r"<meta http-equiv[^>]*>", "", text), look, tmp_path)
        assert server.requests > 0
        server.shutdown()


def test_of_many_examples_those_near_the_window_are_coloured(tmp_path: Path) -> None:
    examples = [Example(number, np.full((2, 20), 0.75), ["word"] * 20, {}) for number in range(250)]
    look = """
      const coloured = card => card.querySelectorAll(".kept").length;
      const cards = [...document.querySelectorAll("article")];
      seen.cards = cards.length;
      seen.first = coloured(cards[0]);
      seen.last = coloured(cards.at(-1));
      dispatchEvent(new Event("beforeprint"));
      seen.printed = coloured(cards.at(-1));
    """
    seen = seen_in_browser(page(examples, ["0", "1"], title="x"), look, tmp_path)
    assert seen == {"cards": 250, "first": 20, "last": 0, "printed": 20}


def test_a_frame_shows_the_page(text: str, tmp_path: Path) -> None:
    frame = f'<!DOCTYPE html><body><iframe sandbox="allow-scripts" srcdoc="{html.escape(text)}"></iframe></body>'
    script = """
      addEventListener("message", event => { document.body.textContent = "cards: " + event.data; });
    """
    speak = "<script>parent.postMessage(document.querySelectorAll('article').length, '*')</script></body>"
    frame = frame.replace(html.escape("</body>"), html.escape(speak))
    assert "cards: 3" in in_browser(frame, script, tmp_path)


def test_table_is_escaped_and_short() -> None:
    text = table([[0.25, np.nan, 1.0]], ["<0>"], ["<a>", "b", "c"], caption="<c>", max_columns=2)
    assert "<a>" not in text
    assert "&lt;a&gt;" in text
    assert "&lt;0&gt;" in text
    assert "1 more" in text
    assert 'title="0.250"' in text
