"""`afina data` as users type it, and its page in a real browser: what is drawn is what will be trained on."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

import trainer.config
from tests.helpers.browser import drop_policy, dump_dom, find_browser, requests_of_pages, run_script, widths_that_hold
from tests.helpers.tokenizers import write_rows
from tests.helpers.warm import afina
from trainer.data.load import inspect_data
from trainer.data.run_data import Data

SMALL = ("model=tiny", "batch.global_size=4", "data.validation=4")
EVIL = '</script><img src="URL/leak"><script>fetch("URL/leak")</script>--><!--{{data}}${7*7}'
CITIES = ("Lima", "Oslo", "Quito", "Kyoto", "Nairobi", "مدريد", "東京 🗼", "Zürich")


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


class Server(http.server.ThreadingHTTPServer):
    """Answers everything, and remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@dataclass(frozen=True, slots=True)
class Page:
    """A page that the command wrote, what the command said, and the data as training would have it."""

    file: Path
    output: str
    returncode: int
    data: Data


def made(folder: Path, overrides: Sequence[str], check: bool = True) -> Page:
    finished = afina("data", *SMALL, *overrides, "--html", folder / "data.html", cwd=folder, check=check)
    config = trainer.config.load([*SMALL, *overrides])
    return Page(
        folder / "data.html",
        finished.output,
        finished.returncode,
        inspect_data(config, tokenizer_of(config)),
    )


def tokenizer_of(config: Any) -> Any:
    from trainer.models.embedded import resolve
    from trainer.models.loading import load_tokenizer

    return load_tokenizer(resolve(config.model.name_or_path, None), config.model)


@pytest.fixture(scope="module")
def chat(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("chat")
    rows = []
    for i in range(40):
        turns = [
            ("system", "Be short."),
            ("user", f"Weather in {CITIES[i % 8]} on day {i}?"),
            ("assistant", f"{i} °C."),
        ]
        turns += [("user", "And tomorrow?"), ("assistant", f"{i + 1} °C in {CITIES[i % 8]}.")] if i % 2 else []
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return made(folder, [f"data.path={write_rows(folder / 'chat.jsonl', rows)}"])


@pytest.fixture(scope="module")
def alpaca(tiny_model: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Rows that try to become markup, one row that cannot be used, one that is there twice."""
    folder = tmp_path_factory.mktemp("alpaca")
    evil = EVIL.replace("URL", server.url)
    rows = [{"instruction": f"Repeat {i}: {evil}", "input": "", "output": f"{i} {evil}"} for i in range(12)]
    rows += [rows[3], {"instruction": evil, "output": ""}]
    return made(folder, [f"data.path={write_rows(folder / 'alpaca.jsonl', rows)}"], check=False)


@dataclass(slots=True)
class Drawn:
    """One example as the browser has it: name, side, ids and mask a token, shown text."""

    name: str = ""
    held_out: bool = False
    ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    text: str = ""


class Dom(HTMLParser):
    """The examples of a dumped DOM, and the text of the elements with an id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[Drawn] = []
        self.by_id: dict[str, str] = {}
        self.tags: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "input", "img", "br", "rect", "line"):
            self._open.append((tag, attributes))
        if tag == "article":
            self.rows.append(Drawn())
        if attributes.get("class") == "chip held-out":
            self.rows[-1].held_out = True
        if ids := attributes.get("data-ids"):
            numbers = [int(i) for i in ids.split()]
            self.rows[-1].ids += numbers
            self.rows[-1].loss_mask += [any(name == "mark" for name, _ in self._open)] * len(numbers)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        classes = [attributes.get("class") for _, attributes in self._open]
        if self._open and self._open[-1][0] == "h3" and "row" in classes:
            self.rows[-1].name += data
        if "tokens" in classes:
            self.rows[-1].text += data
        for _, attributes in self._open[-1:]:
            if name := attributes.get("id"):
                self.by_id[name] = self.by_id.get(name, "") + data


def dom(browser: str, file: Path, hash: str, tmp_path: Path, *more: str) -> Dom:
    return Dom(dump_dom(browser, f"{file.as_uri()}#{hash}", tmp_path, *more))


def without_policy(page: Page) -> str:
    return drop_policy(page.file.read_text(encoding="utf-8"))


def probe(browser: str, html: str, script: str, tmp_path: Path) -> str:
    return Dom(run_script(browser, html, script, tmp_path)).by_id["found"]


@pytest.mark.parametrize("kind", ["chat", "alpaca"])
def test_masks_in_the_browser_are_the_labels(
    kind: str, browser: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page: Page = request.getfixturevalue(kind)
    drawn = {(row.name, row.held_out): row for row in dom(browser, page.file, "n=200", tmp_path).rows}
    total = len(page.data.train) + len(page.data.validation)
    assert len(drawn) == total
    for rows, held_out in ((page.data.train, False), (page.data.validation, True)):
        every = np.arange(len(rows))
        for name, tokens in zip(rows.names(every), rows.tokens(every), strict=True):
            row = drawn[name, held_out]
            assert row.ids == tokens.ids.tolist()
            assert row.loss_mask == tokens.loss_mask.tolist()
            assert any(row.loss_mask)
            assert not all(row.loss_mask)


def test_search_and_sides(chat: Page, browser: str, tmp_path: Path) -> None:
    shown = dom(browser, chat.file, f"q={quote('東京 🗼')}&n=200", tmp_path)
    assert [row for row in shown.rows if "東京 🗼" not in row.text] == []
    assert len(shown.rows) == 5
    assert shown.by_id["count"] == "5 of 5 (40)"
    held = dom(browser, chat.file, "side=held-out", tmp_path)
    assert sorted(row.name for row in held.rows) == sorted(chat.data.validation.names(np.arange(4)))
    by_name = dom(browser, chat.file, "q=CHAT.jsonl%3A7", tmp_path)
    assert [row.name for row in by_name.rows] == ["chat.jsonl:7"]
    first = dom(browser, chat.file, "", tmp_path)
    assert (len(first.rows), first.by_id["more"]) == (20, "Show 20 more of 20")
    none = dom(browser, chat.file, "q=nowhere", tmp_path)
    assert none.rows == []


def test_nothing_leaves_the_page_and_no_row_runs(alpaca: Page, browser: str, server: Server, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    shown = dom(browser, alpaca.file, "n=200", tmp_path, f"--log-net-log={log}")
    assert (shown.tags.count("script"), shown.tags.count("img")) == (2, 0)
    assert all(EVIL.replace("URL", server.url) in row.text for row in shown.rows)
    assert requests_of_pages(log) == []

    # even if something got in, the policy would stop it; without the policy this server is asked
    attack = EVIL.replace("URL", server.url).removeprefix("</script>").split("-->")[0] + "</body>"
    attacked, open_door = tmp_path / "attacked.html", tmp_path / "open.html"
    attacked.write_text(alpaca.file.read_text(encoding="utf-8").replace("</body>", attack), encoding="utf-8")
    open_door.write_text(without_policy(alpaca).replace("</body>", attack), encoding="utf-8")
    dom(browser, attacked, "", tmp_path)
    assert server.asked == []
    dom(browser, open_door, "", tmp_path, f"--log-net-log={log}")
    assert server.asked == ["/leak"] * 2
    assert set(requests_of_pages(log)) == {f"{server.url}/leak"}
    server.asked.clear()


def test_keys_walk_through_tokens(chat: Page, browser: str, tmp_path: Path) -> None:
    script = """
      const box = document.querySelector(".tokens"), tip = document.getElementById("tip");
      box.focus();
      const press = (key) => box.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const said = [];
      for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "Escape"]) {
        press(key);
        said.push(tip.hidden ? "" : tip.textContent);
      }
      return JSON.stringify([box.querySelector(".t").dataset.ids, ...said]);
    """
    first, *said = json.loads(probe(browser, without_policy(chat), script, tmp_path))
    start = f"id {first} · place 0 · prompt, control token"
    assert (said[0], said[2], said[3]) == (start, start, "")
    assert "place 1 · prompt" in said[1]


def test_nothing_sticks_out_of_a_narrow_window(alpaca: Page, browser: str, tmp_path: Path) -> None:
    widths = [340, 420, 800, 1280]
    has_tokens = 'root.querySelectorAll(".t").length > 100'
    assert widths_that_hold(browser, without_policy(alpaca), widths, tmp_path, has_tokens) == widths


def test_what_the_command_says(chat: Page, alpaca: Page) -> None:
    lines = chat.output.splitlines()
    assert (chat.returncode, alpaca.returncode) == (0, 2)
    assert "data: 36 rows to train on, 4 held out" in lines
    assert lines[-1] == f"page: {chat.file}"
    assert "«" in chat.output
    assert "\x1b" not in chat.output
    assert not any("─" in line or "█" in line for line in lines)
    assert "Traceback" not in alpaca.output
    last = alpaca.output.splitlines()[-1]
    assert last.startswith("error: data.max_refused=0: ")
    assert "empty_answer" in last
    assert [line for line in alpaca.output.splitlines() if line.startswith("warning duplicate:")]


def test_a_wrong_place_costs_no_work(alpaca: Page, tmp_path: Path) -> None:
    file = alpaca.file.with_name("alpaca.jsonl")
    bad = afina("data", *SMALL, f"data.path={file}", "--html", tmp_path, check=False)
    assert bad.returncode == 2
    assert bad.output.count("\n") == 1
    assert bad.output.startswith("error: --html=")
    good = afina("data", *SMALL, f"data.path={file}", "data.max_refused=1", "--examples", "0")
    assert "example " not in good.output
