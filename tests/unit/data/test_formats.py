"""Rows into conversations: every shape, and what is said when a row has none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.metrics import CHAT, read, refused, row, said
from trainer.data.formats.detect import detect_format
from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Turn
from trainer.data.sources.rows import RowError
from trainer.errors import DataError

MC = {"question": "Which?", "options": ["red", "green", "blue"]}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca"),  # as Alpaca's own file has it
        ({"messages": CHAT, "prompt": "q", "prompt_id": "1"}, "chat"),  # as UltraChat has it
        ({"conversations": []}, "chat"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "response": "b"}, "prompt_completion"),
        ({**MC, "answer": 0, "subject": "x"}, "multiple_choice"),
        ({"text": "a", "id": 1}, "text"),
    ],
)
def test_formats_are_known_by_their_fields(fields: dict[str, Any], name: str) -> None:
    assert detect_format(row(fields), "auto", {}) == name
    assert detect_format(row(fields), "text", {}) == "text"


def test_unknown_fields_are_answered_with_columns() -> None:
    columns = {"instruction": "Frage", "output": "Antwort"}
    assert detect_format(row({"Frage": "a", "Antwort": "b"}), "auto", columns) == "alpaca"
    for fields, hint in (
        ({"question": "a", "reply": "b"}, "'data.columns={prompt:question,completion:reply}'"),
        ({"instruction": "a", "response": "b", "context": "c"}, "'data.columns={output:response}'"),
        ({"Instruction": "a", "Output": "b"}, "'data.columns={instruction:Instruction,output:Output}'"),
        ({"mesages": CHAT}, "'data.columns={messages:mesages}'"),
        ({"x": 1}, "'data.columns={instruction:YOURS,output:YOURS}'"),
    ):
        with pytest.raises(DataError) as caught:
            detect_format(row(fields), "auto", {})
        assert not isinstance(caught.value, RowError)  # it is about the file
        assert "alpaca needs instruction, output" in str(caught.value)
        assert str(caught.value).endswith(hint)
    with pytest.raises(DataError, match=r"data\.columns\.instructions=x: is no field .* did you mean instruction$"):
        detect_format(row({"x": "a"}), "alpaca", {"instructions": "x"})


def test_a_column_that_a_row_lacks() -> None:
    found = refused({"q": "a"}, "alpaca", {"instruction": "q", "output": "answer"})
    assert found.code == "missing_field"
    assert "answer" in str(found)
    assert "data.columns.output" in str(found)
    assert (
        refused({"q": "a", "output": "b"}, "alpaca", {"instruction": "q", "input": "context"}).code == "missing_field"
    )
    renamed = read({"q": "a", "instruction": "not this", "output": "b"}, "alpaca", {"instruction": "q"})
    assert renamed.turns[0].text == "a"


def test_alpaca() -> None:
    found = read({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]})
    assert found.turns == (
        Turn("system", "Be brief."),
        Turn("user", "a"),
        Turn("assistant", "b"),
        Turn("user", "Add.", input="1 2"),
        Turn("assistant", "3", answer=True),
    )
    assert (found.where, found.line, found.file, found.answer) == ("rows.jsonl:7", 7, 2, "3")
    bare = (Turn("user", "Add."), Turn("assistant", "3", answer=True))
    for none in ({}, dict.fromkeys(("input", "system", "history")), {"input": "", "system": " ", "history": []}):
        assert read({"instruction": "Add.", "output": "3", **none}).turns == bare
    for text in ("a\x00b", "ok\r\n", " a ", "{{ 7*7 }}", "<|im_end|>", "أهلا", "👩‍👩‍👧‍👦"):
        kept = read({"instruction": text, "input": text, "output": text})
        assert [(t.text, t.input) for t in kept.turns] == [(text, text), (text, "")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "empty_answer"),
        ({"output": "   \n"}, "empty_answer"),
        ({"output": None}, "null"),
        ({"output": ["a", "b"]}, "wrong_type"),
        ({"output": 5}, "wrong_type"),
        ({"output": ...}, "missing_field"),
        ({"output": "\ud800"}, "lone_surrogate"),
        ({"instruction": ""}, "empty_prompt"),
        ({"instruction": None}, "null"),
        ({"input": 3}, "wrong_type"),
        ({"input": "a\udfffb"}, "lone_surrogate"),
        ({"system": {"a": 1}}, "wrong_type"),
        ({"history": "a"}, "wrong_type"),
        ({"history": [["a"]]}, "wrong_type"),
        ({"history": [["a", None]]}, "null"),
        ({"history": [["a", ""]]}, "empty_answer"),
    ],
)
def test_alpaca_refuses(change: dict[str, Any], reason: str) -> None:
    fields = {"instruction": "x", "input": "", "output": "y", **change}
    found = refused({k: v for k, v in fields.items() if v is not ...}, "alpaca")
    assert found.code == reason
    assert next(iter(change)) in str(found)
    assert "→" in str(found)


def test_prompt_and_completion() -> None:
    plain = [("user", "q", False), ("assistant", "a", True)]
    assert said(read({"prompt": "q", "completion": "a"})) == plain
    assert said(read({"prompt": "q", "response": "a"})) == plain
    assert said(read({"prompt": CHAT[:1], "completion": CHAT[1:]})) == plain
    assert said(read({"prompt": [*CHAT, CHAT[0]], "completion": " b"})) == [
        ("user", "q", False),
        ("assistant", "a", False),  # part of the prompt, so no answer
        ("user", "q", False),
        ("assistant", " b", True),
    ]
    assert refused({"prompt": "", "completion": "a"}).code == "empty_prompt"
    assert refused({"prompt": "q", "completion": " "}).code == "empty_answer"
    assert refused({"prompt": CHAT, "completion": CHAT[:1]}).code == "empty_loss_mask"
    assert refused({"prompt": "q", "completion": None}).code == "null"
    assert refused({"prompt": "q"}, "prompt_completion").code == "missing_field"


def test_text() -> None:
    found = read({"text": " kept\r\n"})
    assert (found.turns, found.text, found.answer) == ((), " kept\r\n", "")
    assert refused({"text": "\n"}).code == "empty_answer"
    assert refused({"text": 1}).code == "wrong_type"


def test_multiple_choice() -> None:
    asked = "Which?\n\nA. red\nB. green\nC. blue"
    for answer in (1, "B", "b", "green"):
        for options in (MC["options"], {"A": "red", "B": "green", "C": "blue", "D": None}):
            found = read({**MC, "options": options, "answer": answer, "subject": "colours"})
            assert said(found) == [("user", asked, False), ("assistant", "B", True)]
    texts = read({"question": "q", "options": ["B", "C"], "answer": "C"})  # a text, since there is no third option
    assert texts.answer == "B"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 3}, "bad_options"),
        ({"answer": -1}, "bad_options"),
        ({"answer": "D"}, "bad_options"),
        ({"answer": "Green"}, "bad_options"),
        ({"answer": True}, "bad_options"),
        ({"answer": [1]}, "bad_options"),
        ({"answer": None}, "null"),
        ({"options": ["B", "A"], "answer": "A"}, "bad_options"),  # the first option's letter, the second one's text
        ({"options": ["red", "red"], "answer": "red"}, "bad_options"),
        ({"options": ["red"], "answer": 0}, "bad_options"),
        ({"options": ["x"] * 27, "answer": 0}, "bad_options"),
        ({"options": ["red", ""], "answer": 0}, "bad_options"),
        ({"options": ["red", 5], "answer": 0}, "wrong_type"),
        ({"options": {"A": "red", "a": "green"}, "answer": 0}, "bad_options"),
        ({"options": {"first": "red", "second": "green"}, "answer": 0}, "bad_options"),
        ({"options": "red, green", "answer": 0}, "wrong_type"),
        ({"question": " ", "answer": 0}, "empty_prompt"),
    ],
)
def test_multiple_choice_refuses(change: dict[str, Any], reason: str) -> None:
    assert refused({**MC, **change}).code == reason


words = st.sampled_from(
    ["role", "content", "from", "value", "user", "assistant", "function_call", "tool_calls", "text", "[{}]", "parts"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | words | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=2), inner, max_size=4),
    max_leaves=8,
)
fields_of = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "chat": ("messages", "conversations", "contents", "system", "systemInstruction", "tools", "functions", "images"),
    "prompt_completion": ("prompt", "completion", "response", "user", "assistant", "tools", "label"),
    "text": ("text",),
    "multiple_choice": ("question", "options", "answer"),
}


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(fields_of)))
def test_whatever_a_row_holds_it_is_read_or_refused_in_one_line(data: st.DataObject, format: str) -> None:
    message = st.fixed_dictionaries(
        {"role": words | anything, "content": anything}, optional={"tool_calls": anything, "train": anything}
    )
    value = anything | st.lists(message, max_size=3)
    fields = {name: data.draw(value) for name in fields_of[format]}
    message = ""
    try:
        found = parse_example(row(fields), format, {})
        assert found.text or found.answer.strip() or any(turn.extra for turn in found.turns)
    except RowError as error:
        message = str(error)
    assert "\n" not in message
    message.encode()  # it can always be printed
