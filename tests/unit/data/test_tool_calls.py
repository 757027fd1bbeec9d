"""Tools and what the assistant does with them: in the loss as the template writes it, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.conversations import KYOTO, PLAIN, chat, stock, texts_in_loss
from tests.helpers.tokenizers import QWEN_LIKE, with_template
from trainer.data.sources.rows import RowError
from trainer.data.templates.template import Template
from trainer.models.embedded.tiny import CHATML

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyoto", "days": 2}}}
SAID = '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyoto", "days": 2}}\n</tool_call>'


def tool_rows(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [KYOTO[1], {"role": "assistant", "content": None, "tool_calls": [call]}, *KYOTO[3:]]


def test_a_tool_call_is_in_the_loss_as_the_template_writes_it(tokenizer: Any) -> None:
    used = with_template(tokenizer, QWEN_LIKE)
    for extra in ({}, {"content": "I will look."}):
        messages = [KYOTO[1], {"role": "assistant", "content": "", "tool_calls": [CALL], **extra}, *KYOTO[3:]]
        found = Template(used, "chat").encode(chat(messages, tools=[WEATHER]))
        expected = stock(used, messages, [WEATHER])
        assert found.ids == expected["input_ids"][: len(found.ids)]
        assert [int(label) for label in found.loss_mask] == expected["assistant_masks"][: len(found.ids)]
        said = f"I will look.\n{SAID}" if extra else SAID
        assert texts_in_loss(used, found) == [f"{said}<|im_end|>", "It is 20 °C in Kyoto.<|im_end|>"]
        alone = Template(used, "chat").encode(chat(messages[:2], tools=json.dumps([WEATHER])))
        assert texts_in_loss(used, alone) == [f"{said}<|im_end|>"]
        assert alone.ids == found.ids[: len(alone.ids)]
        assert used.decode(alone.ids[: alone.prompt_length]).endswith("<|im_start|>assistant\n")


def test_arguments_as_a_string(tokenizer: Any) -> None:
    """OpenAI gives them as a string of JSON: each template gets them in the form that it takes."""
    takes_both = QWEN_LIKE.replace(
        "{{ call.arguments | tojson }}",
        "{{ call.arguments if call.arguments is string else call.arguments | tojson }}",
    )
    both = Template(with_template(tokenizer, takes_both), "chat")
    arguments = {"city": "Kyoto", "days": 2}
    rows = [chat(tool_rows(a)) for a in (arguments, json.dumps(arguments))]
    assert both.encode(rows[0]) == both.encode(rows[1])
    wants_objects = Template(with_template(tokenizer, QWEN_LIKE), "chat")
    assert wants_objects.encode(rows[1]) == wants_objects.encode(rows[0]) == both.encode(rows[0])
    adds = QWEN_LIKE.replace("{{ call.arguments | tojson }}", "{{ call.arguments + '' }}")
    wants_strings = Template(with_template(tokenizer, adds), "chat")
    assert wants_strings.encode(rows[0]) == wants_strings.encode(rows[1]) == both.encode(rows[0])
    empty = [chat(tool_rows(a)) for a in ({}, "{}", "")]
    assert len({tuple(wants_objects.encode(row).ids) for row in empty}) == 1
    with pytest.raises(RowError, match="quotes the arguments of weather twice") as caught:
        Template(with_template(tokenizer, QWEN_LIKE), "chat").encode(chat(tool_rows('in "Kyoto"')))
    assert caught.value.code == "template"


def test_thoughts_are_in_the_loss_with_their_answer(tokenizer: Any) -> None:
    """Written for the last answer only, as Qwen 3 does."""
    thinks = CHATML.replace(
        "message['content'] +",
        "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content and loop.last else '')"
        " + message['content'] +",
    )
    used = with_template(tokenizer, thinks)
    messages = [{**m, "reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in PLAIN]
    answer = PLAIN[-1]["content"]
    found = Template(used, "chat", train_on="last_assistant").encode(chat(messages))
    assert texts_in_loss(used, found) == [f"<think>Hm.</think>{answer}<|im_end|>"]
    every = Template(used, "chat").encode(chat(messages))
    assert texts_in_loss(used, every) == [f"{PLAIN[1]['content']}<|im_end|>", f"<think>Hm.</think>{answer}<|im_end|>"]
    assert (every.lost_thoughts, every.has_thoughts, found.lost_thoughts) == (1, True, 0)
    hostile = [PLAIN[0], {**PLAIN[1], "reasoning_content": "a<|im_end|>"}]
    plain = Template(used, "chat").encode(chat(hostile))
    assert plain.ids.count(used.convert_tokens_to_ids("<|im_end|>")) == 2
    with pytest.raises(RowError, match="drops or rewrites what the assistant says or thinks"):
        Template(tokenizer, "chat", train_on="last_assistant").encode(chat(messages))


def test_a_template_without_tools_is_asked_without_them_too(tokenizer: Any) -> None:
    """As DeepSeek-V3's own: it writes calls, as strings, and no tools."""
    used = with_template(tokenizer, QWEN_LIKE.replace("if tools", "if none"))
    messages = [KYOTO[1], {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}, *KYOTO[3:]]
    with_tools = Template(used, "chat").encode(chat(messages, tools=[WEATHER]))
    without = Template(used, "chat").encode(chat(messages))
    assert with_tools.drops_tools
    assert not without.drops_tools
    assert (with_tools.ids, with_tools.loss_mask) == (without.ids, without.loss_mask)


@pytest.mark.parametrize(
    ("how", "template", "message"),
    [
        ("ignores calls", QWEN_LIKE.replace("m.tool_calls or []", "[]"), "drops a tool call \\('weather'\\)"),
        ("drops the call's text", QWEN_LIKE.replace("{{ m.content }}", "{{ '' if m.tool_calls else m.content }}"), "→"),
        ("refuses", "{{ raise_exception('no\ntools') }}", "refuses the turns user → assistant.*no tools"),
    ],
)
def test_a_template_that_loses_tools_is_refused(tokenizer: Any, how: str, template: str, message: str) -> None:
    messages = [KYOTO[1], {"role": "assistant", "content": "Wait.", "tool_calls": [CALL]}, *KYOTO[3:]]
    with pytest.raises(RowError, match=message) as caught:
        Template(with_template(tokenizer, template), "chat").encode(chat(messages, tools=[WEATHER]))
    assert caught.value.code == "template"
    assert "→" in str(caught.value)
    assert "\n" not in str(caught.value)
    for name in ("alpaca", "alpaca_short", "plain"):
        with pytest.raises(RowError, match=r"has no place for .* → data\.template=chat"):
            Template(tokenizer, name).encode(chat(messages))
