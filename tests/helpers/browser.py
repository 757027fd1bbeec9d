"""Open pages in a real browser, without a network: what is drawn, what is asked for, what a script finds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.processes import Finished, run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """The browser's path; the test is skipped where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium (`make test` does it as root)")
    return found


def flags(profile: Path) -> list[str]:
    return [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
        *(f"--user-data-dir={profile}", "--virtual-time-budget=4000"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # browsers call home; not from a test
    ]


def open_page(browser: str, address: str, folder: Path, *more: str) -> Finished:
    """Run the browser on one address; ``folder`` holds its profile."""
    return run([browser, *flags(folder / "profile"), *more, address], timeout_seconds=120)


def dump_dom(browser: str, address: str, folder: Path, *more: str) -> str:
    return open_page(browser, address, folder, *more, "--dump-dom").output


def requests_of_pages(net_log: Path) -> list[str]:
    """What pages asked of a network. The browser's own calls, which no flag turns off, have no origin."""
    lines = net_log.read_text(encoding="utf-8", errors="replace").splitlines()
    events = [json.JSONDecoder().raw_decode(line)[0] for line in lines if '"initiator":' in line]  # one a line
    asked = [(event["params"]["initiator"], event["params"]["url"]) for event in events]
    return [url for initiator, url in asked if initiator != "not an origin" and url.startswith("http")]


def drop_policy(html: str) -> str:
    return re.sub(r"<meta http-equiv[^>]*>", "", html)


def run_script(browser: str, html: str, script: str, folder: Path) -> str:
    """The DOM after a script has run in a page without a policy; what it returns, or awaits, is the text of #found."""
    found = '<output id="found"></output><script>(async () => {SCRIPT})().then((x) => { found.textContent = x; })'
    file = folder / "probe.html"
    file.write_text(html.replace("</body>", found.replace("SCRIPT", script) + "</script></body>"), encoding="utf-8")
    return dump_dom(browser, file.as_uri(), folder)


def widths_that_hold(browser: str, html: str, widths: Sequence[int], folder: Path, also: str = "true") -> list[int]:
    """The widths at which nothing sticks out of a page, and ``also`` (an expression of ``root``) is true.

    Browsers have a least width of window, frames have none.
    """
    script = """
      const found = [];
      for (const width of WIDTHS) {
        const frame = document.createElement("iframe");
        frame.style.width = `${width}px`;
        frame.srcdoc = page;
        document.body.append(frame);
        await new Promise((done) => { frame.onload = done; });
        const root = frame.contentDocument.documentElement;
        if (root.scrollWidth <= root.clientWidth && ALSO) found.push(width);
      }
      return JSON.stringify(found);
    """.replace("WIDTHS", json.dumps(list(widths))).replace("ALSO", also)
    text = json.dumps(drop_policy(html)).replace("<", "\\u003c")
    dom = run_script(browser, f"<!doctype html><body><script>const page = {text}</script></body>", script, folder)
    found = re.search(r'<output id="found">(\[[\d,]*\])</output>', dom)
    assert found, dom[-500:]
    return list(json.loads(found[1]))
