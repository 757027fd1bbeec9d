"""Lists of messages into turns, and what is said when they are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.metrics import CHAT, read, refused, said


def test_chat_in_both_spellings() -> None:
    both = [("system", "s", False), ("user", "q", False), ("assistant", "a", True), ("tool", "t", False)]
    roles = {"system": ("system", "developer"), "user": ("user", "human"), "assistant": ("assistant", "gpt")}
    roles["tool"] = ("tool", "observation", "function")
    for spelling in (0, 1):
        turns = [(roles[role][spelling], text) for role, text, _ in both]
        assert said(read({"messages": [{"role": r, "content": t} for r, t in turns]})) == both
        assert said(read({"conversations": [{"from": r, "value": t} for r, t in turns]})) == both
        assert said(read({"conversations": [{"from": r, "value": t} for r, t in turns[1:]], "system": "s"})) == both
    assert said(read({"messages": [*CHAT, {"role": "user", "content": "more"}]}))[-1] == ("user", "more", False)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert read({"messages": [CHAT[0], {"role": "assistant", "content": parts}]}).answer == "a b"
    weights = read({"messages": [*CHAT, CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": 1.0}]})
    assert [t.weight for t in weights.turns if t.role == "assistant"] == [1, 0, 1]


def test_tools_and_their_calls_come_as_they_are() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [
        {"role": "user", "content": "q", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "a", "id": "kept out"},
    ]
    found = read({"messages": messages, "tools": tools})
    assert found.tools == tuple(tools) == read({"messages": messages, "tools": json.dumps(tools)}).tools
    assert [t.extra for t in found.turns] == [None, {"tool_calls": [call]}, {"tool_call_id": "c1", "name": "f"}, None]
    assert found.turns[1].text == ""
    assert all(read({"messages": CHAT, "tools": none}).tools is None for none in (None, [], ""))
    # ShareGPT's calls are a string of JSON, OpenAI's older ones a field of their own: both are calls, not words.
    shared = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ]
    older = [CHAT[0], {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"a": 1}}}]
    for fields in ({"conversations": shared}, {"messages": older}):
        turn = read(fields).turns[1]
        assert (turn.text, turn.extra) == (
            "",
            {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
        )
    words = read({"conversations": [shared[0], {"from": "function_call", "value": "f(1)"}]})
    assert said(words)[1] == ("assistant", "f(1)", True)


def assistant(**message: Any) -> dict[str, Any]:
    return {"messages": [CHAT[0], {"role": "assistant", **message}]}


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"messages": []}, "bad_turns", "messages: is an empty list"),
        ({"messages": CHAT[:1]}, "empty_loss_mask", "no assistant turn"),
        ({"messages": None}, "null", "messages"),
        ({"messages": "q"}, "wrong_type", "a list of messages"),
        ({"messages": ["q"]}, "wrong_type", "messages[0]"),
        ({"messages": [{"role": "usr", "content": "q"}]}, "bad_role", "did you mean user"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "bad_role", "one of system"),
        ({"messages": [{"content": "q"}]}, "missing_field", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
        ({"conversations": [{"from": "human", "value": None}]}, "null", "conversations[0].value"),
        (assistant(content=""), "empty_answer", "messages[1].content"),
        (assistant(content=" \n"), "empty_answer", "messages[1].content"),
        (assistant(content=None), "null", "messages[1].content"),
        (assistant(content=[]), "empty_answer", "messages[1].content"),
        (assistant(content=[{"type": "image_url", "image_url": "x"}]), "media", "only text is trained on"),
        (assistant(content=["a"]), "wrong_type", "messages[1].content[0]"),
        (assistant(content="a\ud800"), "lone_surrogate", "messages[1].content"),
        (assistant(content="a", weight=0.5), "bad_weight", "messages[1].weight=0.5"),
        (assistant(content="a", weight=True), "bad_weight", "weight=True"),
        (assistant(content="a", tool_calls=[{}]), "wrong_type", "messages[1].tool_calls[0]"),
        (assistant(content="a", tool_calls="f()"), "wrong_type", "a list of calls"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"a": "\ud800"}}]), "lone_surrogate", "messages[1]"),
        ({"messages": [{**CHAT[0], "tool_calls": [{"name": "f"}]}]}, "bad_turns", "only the assistant"),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "s"}, "bad_turns", "leave one"),
        ({"messages": CHAT, "tools": "{"}, "wrong_type", "tools: is not JSON"),
        ({"messages": CHAT, "tools": ["f"]}, "wrong_type", "a list of objects"),
    ],
)
def test_chat_refuses(fields: dict[str, Any], reason: str, message: str) -> None:
    found = refused(fields)
    assert found.code == reason
    assert message in str(found)
