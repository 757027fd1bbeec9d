"""What is in the loss under the models' own chat templates, against renderings of one turn after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.conversations import chat, texts_in_loss
from tests.helpers.model_templates import ENDS, knowing, model_template
from trainer.data.formats.turns import Example
from trainer.data.templates.template import Template

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "looks up", "parameters": {"properties": {}}}}
    for name in ("register", "clock")
]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    made = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [made]}


ASKED, ANSWERED = {"role": "user", "content": "Which ferry is oldest?"}, {"role": "assistant", "content": "The Ada."}
SURE, YES = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, of 1800."}
FOUND, TIME = {"role": "tool", "content": '{"year": 1800}'}, {"role": "tool", "content": "10 o'clock"}
CONVERSATIONS = {
    "single": [ASKED, ANSWERED],
    "multi": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED, SURE, YES],
    "tools": [ASKED, call("register", no=2, kind="ferry"), FOUND, ANSWERED, SURE, call("clock", zone="UTC"), TIME, YES],
    "reasoning": [ASKED, {**ANSWERED, "reasoning_content": "Look at 1800."}],
}
OPENERS = ("<|user|>", "<|observation|>")  # what follows where a template ends no turn but the last
CASES = [(name, kind) for name, (_, takes) in ENDS.items() for kind in takes.split()]


def messages_of(name: str, kind: str) -> list[dict[str, Any]]:
    if name == "gptoss" and kind == "reasoning":
        return [ASKED, {**ANSWERED, "thinking": "Look at 1800."}]
    return CONVERSATIONS[kind]


def render(tokenizer: Any, turns: list[dict[str, Any]], tools: Any, ask: bool = False) -> str:
    return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=ask))


def written(message: dict[str, Any]) -> str:
    """The last words that a template writes of a message."""
    calls = message.get("tool_calls")
    return str(list(calls[-1]["function"]["arguments"].values())[-1]) if calls else str(message["content"])


def end_of(whole: str, message: dict[str, Any], at: int) -> int:
    """Where a message's words end, which a template may quote."""
    said = next(s for s in (written(message), json.dumps(written(message))[1:-1]) if s in whole[at:])
    return whole.index(said, at) + len(said)


def reference(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, ends: tuple[str, str]) -> Any:
    """Ask for each answer as it would be asked for, and walk through the rendering of all to find it there.

    Returns the ids, the mask, and how many answers do not stand where they were asked for.
    """
    whole, at, spans, otherwise = render(tokenizer, messages, tools), 0, [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            at = end_of(whole, message, at)
            continue
        prompt = render(tokenizer, messages[:i], tools, ask=True)
        tail = prompt[max(end_of(prompt, m, 0) for m in messages[:i]) :]
        asked = whole[at:].startswith(tail)
        while not whole[at:].startswith(tail):  # as much of it as stands there, in whole tokens
            tail = tail[:-1]
        begin = at + (len(tail) if asked else max(tail.rfind(c) + 1 for c in "\n>"))
        otherwise += not whole.startswith(prompt)
        said, following = end_of(whole, message, begin), messages[i + 1 : i + 2]
        limit = end_of(whole, following[0], said) if following else len(whole)
        closed = whole.find(ends[bool(message.get("tool_calls"))], said, limit)
        opened = [at for opener in OPENERS if (at := whole.find(opener, said, limit)) >= 0]
        if closed >= 0:
            end = whole.index(">", closed) + 1
        elif following:
            end = min(opened) if message.get("tool_calls") else said
        else:
            whole = whole[:said] + tokenizer.eos_token
            end = len(whole)
        spans.append((begin, end))
        at = end
    ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for begin, end in spans:
        for text, in_loss in ((whole[at:begin], False), (whole[begin:end], True)):
            new = tokenizer(text, add_special_tokens=False).input_ids
            ids += new
            mask += [in_loss] * len(new)
        at = end
    return ids, mask, otherwise


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_turn_is_learned_from_its_generation_prompt_on(tokenizer: Any, name: str, kind: str) -> None:
    ends, _ = ENDS[name]
    used = knowing(tokenizer, model_template(name), ends[0])
    messages, tools = messages_of(name, kind), TOOLS if kind == "tools" else None
    example: Example = chat(messages, tools=tools)
    template = Template(used, "chat")
    found = template.encode(example)
    ids, mask, otherwise = reference(used, messages, tools, ends)
    assert used.decode(found.ids) == used.decode(ids)
    assert (found.ids, found.loss_mask) == (ids, mask)
    assert found.asked_otherwise == otherwise
    prompt = template.encode_turns(example.turns[: found.first_turn], example.tools)
    assert (found.ids[: found.prompt_prefix_length] == prompt) or found.asked_otherwise


def test_the_models_own_end_tokens_end_turns(tokenizer: Any, tmp_path: Path) -> None:
    """GLM ends no turn but by the opening of the next, which its model stops at."""
    used = knowing(tokenizer, model_template("glm4moe"), "<|endoftext|>")
    ids = used.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    example = chat(CONVERSATIONS["tools"], tools=TOOLS)
    unknown = Template(used, "chat")
    assert unknown.encode(example).unended == 3
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    used.name_or_path = str(adapter)
    of_adapter = Template(used, "chat").describe()
    used.name_or_path = str(tmp_path)
    template = Template(used, "chat")
    found = template.encode(example)
    assert found.unended == 0
    ends = [text[-17:] for text in texts_in_loss(used, found)]
    assert [e[e.rindex("<") :] for e in ends] == ["<|observation|>", "<|user|>", "<|observation|>", "<|endoftext|>"]
    assert of_adapter == template.describe() != unknown.describe()
    # the base has gone elsewhere: what was saved beside the adapter says it too
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/gone"}))
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    used.name_or_path = str(adapter)
    assert Template(used, "chat").describe() == of_adapter


spoken = st.text(min_size=1, max_size=12).filter(lambda t: t.strip() and not set(t) & set("\ue000\ue001"))


@pytest.mark.parametrize("name", ENDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rounds=st.lists(st.tuples(spoken, spoken), min_size=1, max_size=3))
def test_labels_are_the_answers_and_their_end(tokenizer: Any, name: str, rounds: list[tuple[str, str]]) -> None:
    ends, _ = ENDS[name]
    used = knowing(tokenizer, model_template(name), ends[0])
    turns = [{"role": r, "content": t} for pair in rounds for r, t in zip(("user", "assistant"), pair, strict=True)]
    example = chat(turns)
    template = Template(used, "chat")
    found = template.encode(example)
    learned = texts_in_loss(used, found)
    assert [answer.strip() in text for (_, answer), text in zip(rounds, learned, strict=True)] == [True] * len(rounds)
    assert learned[-1].endswith(ends[0])
    prompt = template.encode_turns(example.turns[:1])
    assert (found.ids[: found.prompt_prefix_length] == prompt) or found.asked_otherwise
