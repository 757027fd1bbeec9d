"""The page of `afina report` in a real browser: it opens without complaint and network, sorts, and shows something."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.helpers.browser import (
    drop_policy,
    dump_dom,
    find_browser,
    open_page,
    requests_of_pages,
    run_script,
    widths_that_hold,
)
from tests.helpers.report_folders import write_comparison, write_run, write_sweep
from tests.helpers.warm import afina

KINDS = ("run", "sweep", "comparison")


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages that the command writes, beside what it reads."""
    out = tmp_path_factory.mktemp("report")
    write_run(out / "run", steps=60, restarts=[20], skipped=[30], exact_match=0.77)
    write_sweep(out / "sweep", ranks=(4, 8, 16), alphas=(8, 16, 32), steps=60)
    write_comparison(out / "comparison")
    for kind in KINDS:
        said = afina("report", out / kind, cwd=out).output.splitlines()
        assert said[-1] == f"written: {out / kind / 'report.html'}, {out / kind / 'report.csv'}"
    return {kind: out / kind / "report.html" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_without_a_complaint_and_a_network(
    kind: str, pages: dict[str, Path], browser: str, tmp_path: Path
) -> None:
    log = tmp_path / "net.json"
    more = ("--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom")
    said = open_page(browser, pages[kind].as_uri(), tmp_path, *more).output
    assert "<h1" in said
    assert [line for line in said.splitlines() if "CONSOLE" in line] == []
    assert requests_of_pages(log) == []


def test_a_complaint_would_be_seen(pages: dict[str, Path], browser: str, tmp_path: Path) -> None:
    """A script that the policy does not name is refused, and that is a line on the console."""
    file = tmp_path / "attacked.html"
    file.write_text(pages["run"].read_text().replace("</body>", "<script>document.title = 'attacked'</script></body>"))
    said = open_page(browser, file.as_uri(), tmp_path, "--enable-logging=stderr", "--dump-dom").output
    assert any("CONSOLE" in line and "Content Security Policy" in line for line in said.splitlines())
    assert "<title>attacked</title>" not in said


def test_a_click_on_a_head_sorts(pages: dict[str, Path], browser: str, tmp_path: Path) -> None:
    script = """
      const table = document.querySelector("table.ranked");
      const column = (k) => [...table.tBodies[0].rows].map((row) => row.cells[k].dataset.value);
      const heads = [...table.tHead.rows[0].cells];
      const place = heads.findIndex((head) => head.textContent === "peak memory");
      const before = column(place);
      heads[place].querySelector("button").click();
      const rising = column(place), said = heads[place].getAttribute("aria-sort");
      heads[place].querySelector("button").click();
      return JSON.stringify([before, rising, said, column(place)]);
    """
    for kind in ("sweep", "comparison"):
        dom = run_script(browser, drop_policy(pages[kind].read_text(encoding="utf-8")), script, tmp_path)
        found = re.search(r'<output id="found">(.*?)</output>', dom)
        assert found is not None
        before, rising, said, falling = json.loads(html.unescape(found[1]))
        known = sorted(int(value) for value in before if value is not None)
        assert [int(value) for value in rising if value is not None] == known
        assert rising != before
        assert [int(value) for value in falling if value is not None] == known[::-1]
        assert said == "ascending"
        without = [None] * (len(before) - len(known))
        assert rising[len(known) :] == falling[len(known) :] == without, "what has no number is last, either way"


def test_it_is_whole_without_its_script(pages: dict[str, Path], browser: str, tmp_path: Path) -> None:
    text = pages["sweep"].read_text(encoding="utf-8")
    file = tmp_path / "plain.html"
    file.write_text(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL), encoding="utf-8")
    seen = dump_dom(browser, file.as_uri(), tmp_path)
    assert seen.count("<svg") == text.count("<svg") > 6
    assert seen.count("<tr") == text.count("<tr") > 10


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_something_to_see(kind: str, pages: dict[str, Path], browser: str, tmp_path: Path) -> None:
    """On a laptop's screen: many colours, and neither a white nor a dark page alone."""
    picture = tmp_path / "seen.png"
    open_page(browser, pages[kind].as_uri(), tmp_path, "--window-size=1366,768", f"--screenshot={picture}")
    seen = imread(picture)
    assert seen.shape[:2] == (768, 1366)
    colours = {tuple(pixel) for pixel in (seen[::2, ::2, :3].reshape(-1, 3) * 255).astype(int).tolist()}
    assert len(colours) > 100
    assert 0.3 < float(seen[..., :3].mean()) < 0.99


def test_nothing_sticks_out_of_a_narrow_window(pages: dict[str, Path], browser: str, tmp_path: Path) -> None:
    widths = [340, 800, 1280]
    for kind in KINDS:
        assert widths_that_hold(browser, pages[kind].read_text(encoding="utf-8"), widths, tmp_path) == widths, kind
