"""The page: nothing from the data becomes markup, nothing is asked of a network, the file is whole or absent."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.prepare.finding import Finding
from trainer.data.sources.rows import RejectedRow
from trainer.errors import ConfigError
from trainer.view import page
from trainer.view.overview import Overview, ShownExample, SourceSummary
from trainer.view.pieces import Piece
from trainer.view.sharing import Sharing

EVIL = "</script><script>alert(1)</script>--><img src=x onerror=alert(1)><!--{{script}}${x}\u2028\ud800\x00\"'&amp;"
# As it reaches the page: control characters and halves of pairs are named.
EVIL_SHOWN = EVIL.replace("\u2028", "⟨U+2028⟩").replace("\ud800", "⟨U+D800⟩").replace("\x00", "⟨U+0000⟩")


def overview(**changes: Any) -> Overview:
    pieces = (Piece(0, (1,), "<|im_start|>", False, True), Piece(1, (7, 8), "😀\n", True, False))
    made = Overview(
        model="tiny",
        tokenizer="384 tokens",
        template="chat",
        train_on="completion",
        packing="auto",
        max_length=64,
        sources=(SourceSummary(("a.jsonl",), "alpaca", 3, 0, 0, 0, Path("refused.jsonl")),),
        train_rows=3,
        held_out_rows=1,
        lengths=np.asarray([10, 12, 30], dtype=np.int32),
        label_tokens=9,
        longest=(("a.jsonl:3", 30),),
        sharing=Sharing(3, 1, 3, 3, 52, 40, 60),
        findings=(),
        refused=(),
        error=None,
        examples=(ShownExample("a.jsonl:1", False, ("first of step 0",), 3, 2, pieces),),
    )
    return replace(made, **changes)


def evil() -> Overview:
    shown = EVIL_SHOWN
    return overview(
        model=EVIL,
        template=EVIL,
        sources=(SourceSummary((EVIL,), EVIL, 3, 1, 1, 1, Path(EVIL.replace("\x00", ""))),),
        longest=((EVIL, 30),),
        findings=(Finding(EVIL, "refused", 1, EVIL, (EVIL,)),),
        refused=(RejectedRow(EVIL, EVIL, EVIL, EVIL),),
        error=EVIL,
        examples=(ShownExample(EVIL, True, (), 1, 1, (Piece(0, (1,), shown, True, False),)),),
    )


class Read(HTMLParser):
    """Tags with their attributes, the text of each script and style, and the text of everything else."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw.append((self._inside, data))
        else:
            self.text += data


def test_nothing_of_the_data_becomes_markup() -> None:
    kind = Read(page.render(overview(findings=(Finding("k", "refused", 1, "m", ("w",)),))))
    bad = Read(page.render(evil()))
    assert [tag for tag, _ in bad.tags if tag in ("script", "img")] == ["script", "script"]
    assert {tag for tag, _ in bad.tags} - {tag for tag, _ in kind.tags} <= {"br", "code"}
    assert not any(name.startswith("on") or name == "style" for _, attributes in bad.tags for name in attributes)
    assert [text for tag, text in bad.raw if tag == "style"] == [text for tag, text in kind.raw if tag == "style"]
    assert bad.raw[-1] == kind.raw[-1]
    assert bad.text.count(EVIL_SHOWN) >= 8
    (example,) = json.loads(bad.raw[1][1])
    assert (example["name"], example["pieces"]) == (EVIL_SHOWN, [[[1], EVIL_SHOWN, page.IN_LOSS]])


def test_the_policy_allows_our_script_and_style_alone() -> None:
    read = Read(page.render(evil()))
    (policy,) = [a["content"] for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in read.raw]
    assert directives["default-src"] == "'none'"
    assert (directives["style-src"], directives["script-src"]) == (f"'sha256-{hashes[0]}'", f"'sha256-{hashes[2]}'")
    assert "unsafe" not in str(policy)


def test_nothing_is_asked_of_a_network() -> None:
    text = page.render(overview())
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|fetch\(|XMLHttpRequest|<link|<iframe", text)
    assert text == page.render(overview())


def test_masks_and_ids_are_carried_whole() -> None:
    read = Read(page.render(overview()))
    (example,) = json.loads(read.raw[1][1])
    assert example["pieces"] == [[[1], "<|im_start|>", page.CONTROL], [[7, 8], "😀\n", page.IN_LOSS]]
    assert (example["tokens"], example["loss_tokens"], example["held"]) == (3, 2, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Nothing was found wrong"),
        ({"findings": (Finding("leak", "warning", 1, "m", ()),)}, "Look at: leak"),
        ({"findings": (Finding("truncated", "note", 1, "m", ()),)}, "Nothing was found wrong"),
        ({"error": "data.max_refused=0: no"}, "Training would refuse this data. data.max_refused=0: no"),
        ({"lengths": np.asarray([9] * 99 + [900], dtype=np.int32)}, "The last bar holds all rows"),
        ({"max_length": 11}, "The dashed line is data.max_length = 11"),
        ({"lengths": np.zeros(0, dtype=np.int32), "train_rows": 0, "sharing": None}, "There is no row to train on"),
    ],
)
def test_what_the_page_says(changes: dict[str, Any], words: str) -> None:
    assert words in Read(page.render(overview(**changes))).text


def test_a_page_is_written_over_a_file_and_through_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "data.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    page.write(overview(), link)
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == page.render(overview())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.html", "link.html"]
    assert target.stat().st_mode & 0o044


def test_places_where_no_page_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "data.html", "there is no folder"),
        (tmp_path / "pipe", "a device or a pipe"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            page.write(overview(), path)
        assert "\n" not in str(caught.value)
        assert "--html" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
