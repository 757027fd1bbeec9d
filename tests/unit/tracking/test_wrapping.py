"""Long lines are wrapped at words on a terminal, and not at all in a pipe."""

from __future__ import annotations

import io
import os
import pty

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.tracking.logs import print_line, wrap_words

LONG = (
    "error: method=nope: must be one of adalora, bottleneck, dora, full, ia3, lora, prefix, prompt, qlora, qlora_8bit, "
    "rslora → method=lora"
)
WORDS = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=30)


@given(st.lists(WORDS, min_size=1, max_size=30), st.integers(20, 120), st.integers(0, 8))
def test_no_word_is_broken_and_none_is_lost(words: list[str], width: int, indent: int) -> None:
    line = " " * indent + " ".join(words)
    wrapped = wrap_words(line, width).split("\n")
    assert " ".join(wrapped).split() == line.split()
    assert [each for each in wrapped if len(each) > width and " " in each.strip()] == []
    assert all(each.startswith(" " * indent) for each in wrapped)


def test_what_fits_stays_as_it_is() -> None:
    text = "two   spaces\tand a tab\n\n  indented  \nlast"
    assert wrap_words(text, 40) == text


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_whole_words(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        print_line(LONG, stream)
        shown = os.read(terminal, 65536).decode().split("\r\n")
    os.close(terminal)
    assert max(map(len, shown)) <= columns
    assert " ".join(shown).split() == LONG.split()


def test_a_pipe_gets_the_line_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    print_line(LONG, stream)
    assert stream.getvalue() == LONG + "\n"
