"""Pages that need nothing but themselves: no text becomes markup, the policy allows one script and one style alone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.html import as_json, assemble, check_target, text, visible

EVIL = "</script><img src=x onerror=alert(1)>\"'&amp;{{part}}"
BODY = '<body><p title="{{part}}">{{part}}</p><script>{{script}}</script></body>'


def test_a_text_is_escaped_in_elements_and_attributes() -> None:
    assert not set("<>\"'") & set(text(EVIL))
    assert html.unescape(text(EVIL)) == EVIL
    assert text(None) == "None"


def test_what_cannot_be_seen_is_named() -> None:
    assert visible("a\x1b[31m\u202eb\n\tم\u200cر") == "a⟨U+001B⟩[31m⟨U+202E⟩b\n\tم\u200cر"


def test_json_cannot_end_its_script() -> None:
    written = as_json([EVIL, "\u2028"])
    assert not re.search("[<>&\u2028]", written)
    assert json.loads(written) == [EVIL, "\u2028"]


def test_parts_are_put_in_once_and_the_policy_names_the_hashes() -> None:
    page = assemble("test", BODY, {"part": text(EVIL), "title": "a page"}, "p { color: red }", "go()")
    assert "<title>afina test: a page</title>" in page
    assert page.count(text(EVIL)) == 2, "{{part}} in a part stays what it is"
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    for body in (style[1], "go()"):
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in page
    assert style[1].endswith("p { color: red }")
    assert "unsafe" not in page
    assert not re.search(r"https?:|url\(|@import", page)


@pytest.mark.parametrize("place", ["", "nowhere/page.html"])
def test_a_place_where_no_page_can_go_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to="):
        check_target("--to", tmp_path / place)
