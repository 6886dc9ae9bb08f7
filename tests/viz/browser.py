"""A page in headless Chromium, with one more script that says what it saw."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def in_browser(text: str, script: str, folder: Path) -> str:
    """The document after the page, opened from a file, and one more script have run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--disable-features=IsolateSandboxedIframes",  # virtual time does not wait for the process of a frame
         "--virtual-time-budget=3000", "--window-size=1200,900", "--dump-dom", path.as_uri()],
        capture_output=True, timeout=120, check=True, encoding="utf-8",
    )  # fmt: skip
    return done.stdout


def seen_in_browser(text: str, script: str, folder: Path) -> dict[str, Any]:
    """What a script puts into the object `seen`, half a second after the page has opened."""
    body = f"const seen = {{}}; {script} document.body.replaceChildren(JSON.stringify(seen));"
    dom = in_browser(text, f"setTimeout(async () => {{ {body} }}, 500);", folder)
    found = re.search(r"<body>(.*)</body>", dom, re.DOTALL)
    assert found is not None
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen
