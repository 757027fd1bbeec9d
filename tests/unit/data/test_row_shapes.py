"""Rows as people have them: the same conversation in its many spellings, and what changes a row's meaning."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.metrics import CHAT, read, refused, row, said
from tests.helpers.tokenizers import QWEN_LIKE, with_template
from trainer.data.formats.detect import detect_format
from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Turn
from trainer.data.templates.template import Template
from trainer.errors import DataError

TOOL = {"name": "register", "description": "look up", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
ASKED = [("user", "q", False), ("assistant", "a", True)]


def spelled(user: tuple[str, Any], assistant: tuple[str, Any], keys: tuple[str, str]) -> list[dict[str, Any]]:
    return [dict(zip(keys, said, strict=True)) for said in (user, assistant)]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": json.dumps(CHAT)},
        {"messages": [json.dumps(message) for message in CHAT]},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"], "name": [None, None]}},
        {"messages": None, "conversations": spelled(("human", "q"), ("gpt", "a"), ("from", "value"))},
        {"messages": spelled(("Human", "q"), ("ChatGPT", "a"), ("role", "content"))},
        {"messages": spelled(("USER", "q"), ("model", "a"), ("role", "content"))},
        {"contents": spelled(("user", [{"text": "q"}]), ("model", [{"text": "a"}]), ("role", "parts"))},
        {
            "messages": spelled(
                ("user", [{"type": "input_text", "text": "q"}]),
                ("assistant", [{"type": "output_text", "text": "a"}]),
                ("role", "content"),
            )
        },
        {"user": "q", "assistant": "a"},
        {"prompt": None, "completion": None, "user": "q", "assistant": "a"},
        {"prompt": "q", "completion": {"role": "assistant", "content": "a"}},
    ],
)
def test_one_conversation_in_many_spellings(fields: dict[str, Any]) -> None:
    found = read(fields)
    assert said(found) == ASKED
    assert found.unused == ()


def test_columns_reach_the_keys_of_messages() -> None:
    fields = {"conversation": spelled(("user", "q"), ("assistant", "a"), ("speaker", "text"))}
    columns = {"messages": "conversation", "role": "speaker", "content": "text"}
    assert said(read(fields, "auto", columns)) == ASKED
    with pytest.raises(DataError) as caught:
        detect_format(row(fields), "auto", {})
    assert str(caught.value).endswith("'data.columns={messages:conversation,role:speaker,content:text}'")
    for known, wanted in (({}, "role:speaker"), ({"role": "speaker"}, "content:text")):
        found = refused(fields, "auto", {"messages": "conversation", **known})
        assert found.hint == f"'data.columns={{{wanted}}}'"


def test_a_system_text_stands_beside_every_conversation() -> None:
    for fields in (
        {"user": "q", "assistant": "a", "system": "s"},
        {"prompt": "q", "completion": "a", "system": "s"},
        {"contents": CHAT, "systemInstruction": {"parts": [{"text": "s"}]}},
        {"messages": CHAT, "system": "s"},
    ):
        assert said(read(fields)) == [("system", "s", False), *ASKED]
    twice = {"prompt": [{"role": "system", "content": "s"}, CHAT[0]], "completion": "a", "system": "s"}
    assert refused(twice).code == "bad_turns"


def test_calls_and_results_as_messages_of_their_own() -> None:
    call = {"name": "register", "arguments": {"no": 0}}
    messages = [
        CHAT[0],
        *({"role": "tool_call", "content": json.dumps({**call, "arguments": {"no": i}})} for i in range(2)),
        {"role": "tool_response", "content": {"year": 1800, "é": None}},
        CHAT[1],
    ]
    turns = read({"messages": messages}).turns
    calls = [{"type": "function", "function": {**call, "arguments": {"no": i}}} for i in range(2)]
    assert turns[1] == Turn("assistant", "", answer=True, extra={"tool_calls": calls})
    assert turns[2] == Turn("tool", '{"year": 1800, "é": null}')
    assert len(turns) == 4
    messages[2] = {**messages[2], "loss": False}
    assert [turn.weight for turn in read({"messages": messages}).turns] == [1, 1, 0, 1, 1], "one call is learned"


def test_thoughts_in_a_part_of_their_own() -> None:
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "a"}]
    turn = read({"messages": [CHAT[0], {"role": "assistant", "content": parts}]}).turns[1]
    assert (turn.text, turn.extra) == ("a", {"reasoning_content": "Hm."})


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS)},
        {"tools": [json.dumps(tool) for tool in TOOLS]},
        {"functions": [TOOL]},
        {"functions": TOOLS},
        {"functions": [TOOL], "tools": TOOLS},
        {"system_tools": json.dumps(TOOLS)},
    ],
)
def test_tools_wherever_they_stand(fields: dict[str, Any]) -> None:
    inner = fields.pop("system_tools", None)
    messages = [{"role": "system", "content": "s", "tools": inner}, *CHAT] if inner else CHAT
    found = read({"messages": messages, **fields})
    assert (found.tools, found.unused) == (tuple(TOOLS), ())
    assert all(turn.extra is None for turn in found.turns)


def test_two_lists_of_tools_that_differ_are_refused() -> None:
    other = [{**TOOL, "name": "clock"}]
    assert "other tools stand in `functions`" in str(refused({"messages": CHAT, "tools": TOOLS, "functions": other}))


PHI_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% if m.role == 'system' and m.tools %}"
    "{{ '<tools>' + m.tools + '</tools>' }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("place", ["system", "tools", "tools and no system text"])
def test_tools_are_written_where_the_template_wants_them(tokenizer: Any, place: str) -> None:
    written = json.dumps(TOOLS)
    messages = [{"role": "system", "content": "s"}, *CHAT] if place != "tools and no system text" else CHAT
    if place == "system":
        messages = [{**messages[0], "tools": written}, *messages[1:]]
    fields = {"messages": messages, **({} if place == "system" else {"tools": TOOLS})}
    system = "s" if messages[0]["role"] == "system" else ""
    found = Template(with_template(tokenizer, PHI_LIKE), "chat").encode(parse_example(row(fields), "chat", {}))
    head = f"<|im_start|>system\n{system}<tools>{written}</tools><|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    assert tokenizer.decode(found.ids) == f"{head}<|im_start|>assistant\na<|im_end|>"
    learned = [i for i, label in zip(found.ids, found.loss_mask, strict=True) if label]
    assert tokenizer.decode(learned) == "a<|im_end|>"
    beside = Template(with_template(tokenizer, QWEN_LIKE), "chat").encode(parse_example(row(fields), "chat", {}))
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in tokenizer.decode(beside.ids)


@pytest.mark.parametrize("key", ["train", "loss", "weight"])
def test_a_message_that_says_so_is_not_in_the_loss(key: str) -> None:
    no, yes = (0, 1) if key == "weight" else (False, True)
    draft = [CHAT[0], {**CHAT[1], key: no}, CHAT[0], {**CHAT[1], key: yes}, CHAT[0], {**CHAT[1], key: None}]
    assert [turn.weight for turn in read({"messages": draft}).turns if turn.role == "assistant"] == [0, 1, 1]
    for wrong in ("no", 2, 0.5, []):
        assert refused({"messages": [CHAT[0], {**CHAT[1], key: wrong}]}).code == "bad_weight"
    other = "train" if key != "train" else "loss"
    both = refused({"messages": [CHAT[0], {**CHAT[1], key: no, other: True}]})
    assert f"{min(key, other, key=['weight', 'train', 'loss'].index)}" in str(both)


KTO = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_good_and_bad_answers_are_not_learned_alike(label: Any) -> None:
    found = refused({**KTO, "label": label})
    assert (found.code, found.hint) == ("preference", "'data.columns={keep:label}' trains on the good ones alone")
    kept = {"keep": "label"}
    if str(label).lower() == "true":
        assert said(read({**KTO, "label": label}, "auto", kept)) == ASKED
    else:
        assert refused({**KTO, "label": label}, "auto", kept).code == "not_kept"
    assert refused({**KTO, "label": "maybe"}, "auto", kept).code == "wrong_type"
    assert read({**KTO, "label": 3}).unused == ("label",)


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "no"}, {"completion": "chosen"}),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, {"completion": "chosen"}),
        ({"prompt": "q", "chosen": CHAT, "rejected": CHAT}, {"messages": "chosen"}),
        ({"chosen": CHAT, "rejected": CHAT}, {"messages": "chosen"}),
        ({"instruction": "q", "chosen": "a", "rejected": "no"}, {"output": "chosen"}),
        (
            {"conversations": CHAT[:1], "chosen": CHAT[1], "rejected": CHAT[1]},
            {"prompt": "conversations", "completion": "chosen"},
        ),
        ({"question": "q", "chosen": "a", "rejected": "no"}, {"prompt": "question", "completion": "chosen"}),
    ],
)
def test_preference_data_are_told_with_the_columns_that_train(fields: dict[str, Any], columns: dict[str, str]) -> None:
    shown = ",".join(f"{ours}:{theirs}" for ours, theirs in columns.items())
    with pytest.raises(DataError, match="preference data") as caught:
        detect_format(row(fields), "alpaca" if "conversations" in fields else "auto", {})
    assert f"data.columns={{{shown}}}" in str(caught.value)
    found = read(fields, "auto", columns)
    assert said(found) == ASKED
    assert "rejected" in found.unused


@pytest.mark.parametrize("name", ["images", "image", "audio", "videos"])
def test_more_than_text_is_refused_by_its_name(name: str) -> None:
    for fields in ({"messages": CHAT, name: ["x"]}, {"messages": [{**CHAT[0], name: ["x"]}, CHAT[1]]}):
        found = refused(fields)
        assert (found.code, name in str(found)) == ("media", True)
    assert said(read({"messages": CHAT, name: []})) == ASKED, "a row without any among others that have some"
    assert read({"text": "a", name: "x"}).unused == (name,), "a text stands for itself"


def test_numbers_are_texts_where_columns_name_them() -> None:
    for number, text in ((0, "0"), (1.5, "1.5"), (True, "true")):
        fields = {"instruction": "q", "output": number}
        assert refused(fields).hint == "quote it; or 'data.columns={output:output}' takes numbers as text"
        assert read(fields, "auto", {"output": "output"}).answer == text
        labelled = {"text": "q", "label": number}
        assert read(labelled, "auto", {"instruction": "text", "output": "label"}).answer == text


def test_what_nobody_reads_is_named() -> None:
    fields = {"messages": [{**CHAT[0], "id": 1, "time": None}, {**CHAT[1], "lang": "en"}], "loss": 1, "empty": ""}
    assert read(fields).unused == ("messages[].id", "messages[].lang", "loss")
    renamed = {"chat": fields["messages"], "x": 1}
    assert read(renamed, "auto", {"messages": "chat"}).unused == ("chat[].id", "chat[].lang", "x")
    assert read({"instruction": "q", "output": "a", "Input": "i", "input": "j"}).unused == ("Input",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), json_values), min_size=1, max_size=4))
def test_any_conversation_as_a_string_of_json_is_itself(said: list[tuple[str, Any]]) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, (text, _) in enumerate([*said, *said])]
    for i, (_, arguments) in enumerate(said):
        messages[2 * i + 1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    expected = read({"messages": messages})
    assert read({"messages": json.dumps(messages)}) == expected
    assert read({"messages": [json.dumps(message) for message in messages]}) == expected
    lists = {key: [message.get(key) for message in messages] for key in ("role", "content", "tool_calls")}
    assert read({"messages": lists}) == expected
