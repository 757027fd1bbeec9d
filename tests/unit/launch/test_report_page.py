"""The page of `afina report`: its numbers are the files', no text of theirs becomes markup, it is small and whole."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.report import page
from launch.report.gather import gather
from launch.report.svg import colour
from tests.helpers.report_folders import write_comparison, write_csv, write_run, write_sweep
from trainer.tracking.files import read_metrics, read_summary

EVIL = "<img src=x onerror=alert(1)>\"'&amp;{{style}}<script>alert(2)<\u2028script>\x1b[31m\u202e"
EVIL_SHOWN = EVIL.replace("\u2028", "⟨U+2028⟩").replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")


class Read(HTMLParser):
    """Tags with their attributes, the scripts, each table by its class as rows of (text, data-value), all text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.text = ""
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self._rows: list[list[tuple[str, str | None]]] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._inside = tag
        if tag == "table":
            self._rows = self.tables[attributes["class"] or ""] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append(("", attributes.get("data-value")))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.raw.append(data)
            return
        self.text += data
        if self._inside in ("td", "th"):
            text, value = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, value)


def read(folder: Path) -> Read:
    return Read(page.render(gather(folder)))


def test_the_numbers_of_the_page_are_those_of_the_files(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", ranks=(8, 16), alphas=(16, 32), steps=20)
    header, *lines = read(tmp_path / "s").tables["ranked"]
    names = [text for text, _ in header]
    seen = set()
    for line in lines:
        values = dict(zip(names, line))
        folder = tmp_path / "s" / f"r{values['r'][0]}_alpha{values['alpha'][0]}"
        summary, steps = read_summary(folder), read_metrics(folder)
        assert summary is not None
        assert float(values["eval loss"][1] or "") == summary["metrics"]["eval_loss"]
        assert values["eval loss"][0] == f"{summary['metrics']['eval_loss']:.4f}"
        assert int(values["trained"][0].replace(",", "")) == summary["trainable_parameters"]
        peak = max(step.get("peak_memory_bytes", 0) for step in steps)
        assert values["peak memory"] == (f"{peak / 2**30:.2f} GiB", str(peak))
        assert values["seconds"][0] == f"{summary['wall_seconds']:,.0f}"
        seen.add(folder.name)
    assert len(seen) == 4


def test_the_heatmap_holds_every_cell_and_frames_the_best(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", ranks=(8, 16), alphas=(16, 32), steps=20)
    text = page.render(gather(tmp_path / "s"))
    losses = {}
    for folder in (tmp_path / "s").glob("r*"):
        summary = read_summary(folder)
        assert summary is not None
        losses[folder.name] = summary["metrics"]["eval_loss"]
        r, alpha = re.findall(r"\d+", folder.name)
        assert f"<title>r={r} alpha={alpha}: eval_loss {losses[folder.name]:.4f}, rank " in text
    (best,) = re.findall(r'<rect [^>]*class="best"><title>r=(\d+) alpha=(\d+):', text)
    assert f"r{best[0]}_alpha{best[1]}" == min(losses, key=lambda name: losses[name])
    assert "<h2>rank × alpha</h2>" in text
    assert "<h2>All varied keys</h2>" not in text


def test_which_figures_there_are_follows_from_the_keys_that_vary(tmp_path: Path) -> None:
    write_sweep(tmp_path / "three", ranks=(8, 16), alphas=(16, 32), rates=(1e-4, 1e-3), steps=12)
    assert "<h2>All varied keys</h2>" in page.render(gather(tmp_path / "three"))
    for r in (4, 8, 16):
        write_run(tmp_path / "one" / f"r{r}", [f"method.r={r}"], final=0.3 + r / 100, steps=12)
    one = page.render(gather(tmp_path / "one"))
    assert "<h2>eval loss by r</h2>" in one, "alpha is twice the rank: it tells nothing new"
    assert "rank × alpha" not in one
    several = read(tmp_path / "one")
    assert {line[0][0] for line in several.tables["config"][1:]} == {"method.r", "method.alpha"}


def hostile(folder: Path, word: str) -> Path:
    """A comparison in which every text that a file can bring is ``word``."""
    for number, name in enumerate(("one", word.replace("/", "")[:60])):
        made = write_run(
            folder / f"run{number}", [f"method.r={4 * number + 4}"], steps=12, seed=number, final=0.5 - number / 10
        )
        run = made.rename(folder / name)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("split: train", f"split: {json.dumps(word)}"))
        log = (run / "log.txt").read_text().replace("yes", word).replace("headlines.jsonl", word)
        stamp = log[:25]
        (run / "log.txt").write_text(f"{log}{stamp} warning: {word}\n{stamp} stopped early: {word}\n", newline="")
        words = {"hosts": [word], "devices": [word], "python": word, "command": [word, word], "git": {"commit": word}}
        (run / "environment.json").write_text(json.dumps({**words, "packages": {"torch": word}}))
    rows = [
        {"method": word, "status": "finished", "tried": json.dumps({word: 1}), "folder": "one", "error": ""},
        {"method": "b", "status": "finished", "tried": "{}", "folder": f"x/{word.replace('/', '')[:60]}", "error": ""},
        {"method": f"c{word}", "status": word, "tried": word, "folder": "", "error": word},
    ]
    write_csv(folder / "compare.csv", rows)
    return folder


@pytest.mark.parametrize("kind", ["comparison", "sweep", "run"])
def test_no_text_of_a_file_becomes_markup(kind: str, tmp_path: Path) -> None:
    pages = []
    for place, word in (("bad", EVIL), ("good", "harmless")):
        folder = hostile(tmp_path / place, word)
        if kind == "sweep":
            (folder / "compare.csv").unlink()
        pages.append(read(next(folder.glob("*img*" if place == "bad" else "harmless*")) if kind == "run" else folder))
    bad, good = pages
    assert [tag for tag, _ in bad.tags] == [tag for tag, _ in good.tags]
    assert bad.raw == good.raw, "style and script are ours"
    for _, attributes in bad.tags:
        assert not any(name.startswith("on") or name in ("style", "href", "src") for name in attributes)
    assert bad.text.count(EVIL_SHOWN[:30]) >= 8
    assert not set("\x1b\u202e\u2028") & set(bad.text)


def test_nothing_is_asked_of_a_network_and_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    text = page.render(gather(write_comparison(tmp_path / "c")))
    assert not re.search(r"https?:|url\(|@import|\bsrc=|fetch\(|XMLHttpRequest|<link|<iframe", text)
    assert "unsafe" not in text
    assert text == page.render(gather(tmp_path / "c"))


def test_a_page_of_thirty_runs_of_300_steps_is_small(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", ranks=(4, 8, 16, 32, 64, 128), alphas=(4, 8, 16, 32, 64), steps=300)
    size = len(page.render(gather(tmp_path / "s")).encode())
    assert 50_000 < size < 300_000


def test_every_figure_says_what_it_shows(tmp_path: Path) -> None:
    for folder in (write_comparison(tmp_path / "c"), write_run(tmp_path / "r", steps=20, restarts=[8], skipped=[4])):
        text = page.render(gather(folder))
        figures = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
        assert len(figures) >= 4
        for figure in figures:
            assert re.search(r'<svg [^>]*role="img" aria-label="[^"]+"', figure)
            assert re.search(r"<figcaption>[^<]{10,}[.]</figcaption>", figure), figure[-300:]
        assert text.count("<title>") > 10


def test_restarts_and_faults_are_on_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", steps=40, restarts=[10, 20], skipped=[15])
    found = read(folder)
    (events,) = [rows for kind, rows in found.tables.items() if kind == ""]
    assert [(line[1][0], line[2][0]) for line in events[1:]] == [
        ("10", "stopped"),
        ("10", "resumed"),
        ("14", "warning"),
        ("20", "killed"),
        ("20", "resumed"),
    ]
    assert "r, step 15: update left out" in found.text
    assert "It was trained by 3 processes, one after the other." in found.text


def test_answers_stand_beside_the_reference(tmp_path: Path) -> None:
    text = read(write_run(tmp_path / "r", steps=16)).text
    assert re.search(r"reference\s*no\s*before training\s*I cannot tell whether .*after, step 16\s*yes", text)


def test_colours_of_a_cell_can_be_read() -> None:
    """WCAG's contrast of the number to its cell: 4.5 is asked of text."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    seen = [colour(k / 50) for k in range(51)]
    for fill, ink in seen:
        one, two = luminance(fill), luminance("#000000" if ink == "on-light" else "#ffffff")
        assert (max(one, two) + 0.05) / (min(one, two) + 0.05) >= 4.5, (fill, ink)
    levels = [luminance(fill) for fill, _ in seen]
    assert levels == sorted(levels), "lightness alone tells the order"
