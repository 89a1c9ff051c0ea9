"""Pages in a real browser: which one there is, and what a probe finds on a page.

`visit(page, 390, folder, script)` shows the page in a frame of that width and returns what
`script` put into `found`. `.ci/run` installs chromium where none is; without one the tests of
pages are skipped, and conftest says so in the report's head.
"""

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome is installed"
)
# No window, no first-run questions, and no traffic but the page's own.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
_PROBE = """
<iframe id="page" style="border:0;width:WIDTHpx;height:2000px" srcdoc="PAGE"></iframe>
<pre id="probe"></pre>
<script>
addEventListener("load", () => {
  const frame = document.getElementById("page").contentWindow, page = frame.document;
  const found = {width: frame.innerWidth, scroll: page.documentElement.scrollWidth};
  found.wide = [...page.body.querySelectorAll("*")]
    .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > frame.innerWidth + 1)
    .map(e => e.tagName);
  found.drawn = [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width);
  SCRIPT
  document.getElementById("probe").textContent = JSON.stringify(found);
});
</script>
"""


def command(profile: Path) -> list[str]:
    """The browser and its flags, with `profile` as its (empty) folder of user data."""
    return [str(BROWSER), *FLAGS, f"--user-data-dir={profile}"]


def visit(page: str, width: int, folder: Path, script: str = "") -> dict:
    """What the probe found on `page` in a window of `width`; fails on any console line.

    Always `width` (the window's), `scroll` (what the page needs), `wide` (tags that stick out of
    the window and do not scroll inside the page) and `drawn` (width of each drawing); `script`
    adds to `found`, with the page's window as `frame` and its document as `page`.

    The page lies in a frame of that width: a browser's own window does not get as narrow as a
    phone. It runs as a program that ends by itself, so nothing is left behind.
    """
    probe = folder / f"probe_{width}.html"
    text = _PROBE.replace("WIDTH", str(width)).replace("SCRIPT", script)
    probe.write_text(text.replace("PAGE", escape(page)))
    flags = ["--window-size=1600,2200", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*command(folder / "profile"), *flags, probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not lines
    found = re.search(r'<pre id="probe">(\{.*?\})</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(found[1])
