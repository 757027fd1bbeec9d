"""What is asked of a trained model is what it was trained on; where the template does not allow it, that is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.helpers.conversations import chat, texts_in_loss
from tests.helpers.model_templates import knowing
from tests.helpers.tokenizers import write_rows
from trainer.config.dataset_spec import DatasetSpec
from trainer.config.schema import DataConfig
from trainer.data.prepare.prepare import prepare
from trainer.data.prepare.table import PreparedTable
from trainer.data.prepare.turn_checks import check_template_kwargs
from trainer.data.sources.rows import RowError
from trainer.data.templates.template import Template

TEMPLATES = Path(__file__).parent / "templates"
EOS = {"harmony": "<|return|>", "r1distill": "<｜end▁of▁sentence｜>", "glm45": "<|endoftext|>"}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in ("register", "clock")]
EMPTY = "<think>\n\n</think>\n\n"


def tokenizer_of(tokenizer: Any, name: str) -> Any:
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return knowing(tokenizer, source, EOS.get(name, "<|im_end|>"))


def say(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def called(name: str, arguments: Any, gives: Any) -> list[dict[str, Any]]:
    made = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "assistant", "content": "", "tool_calls": [made]}, {"role": "tool", "content": gives}]


def trajectory(rounds: int, arguments: Any = None) -> list[dict[str, Any]]:
    given = {"kind": "lamp", "no": 1} if arguments is None else arguments
    calls = [message for i in range(rounds) for message in called("register", given, f'{{"year": 18{i:02}}}')]
    return [*say("Which lamp is oldest?"), *calls, {"role": "assistant", "content": "That of 1800."}]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.times = function, 0

    def __call__(self, *given: Any, **more: Any) -> Any:
        self.times += 1
        return self.function(*given, **more)


def prepared(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], **keys: Any) -> PreparedTable:
    path = write_rows(folder / "rows.jsonl", rows)
    data = DataConfig(path=str(path), **{"max_length": 4096, **keys})
    return prepare(DatasetSpec(str(path)), data, tokenizer, folder / "cache")


def kinds(table: PreparedTable) -> dict[str, int]:
    return {finding.kind: finding.count for finding in table.findings}


def test_what_the_template_opens_an_answer_with_is_learned(tokenizer: Any) -> None:
    used = tokenizer_of(tokenizer, "qwen3")
    example = chat(say("Which ferry is oldest?", "The Ada."))
    template = Template(used, "chat")
    found = template.encode(example)
    assert texts_in_loss(used, found) == [f"{EMPTY}The Ada.<|im_end|>"]
    assert template.encode_turns(example.turns[:1]) == found.ids[: found.prompt_length]
    assert used.decode(template.opening_ids()) == EMPTY
    calls = template.encode(chat(trajectory(2), tools=TOOLS))
    assert [text[:11] for text in texts_in_loss(used, calls)] == ["<tool_call>", "<tool_call>", "<think>\n\n</"]
    assert calls.asked_otherwise == found.asked_otherwise == 0


def test_variables_of_the_template(tokenizer: Any) -> None:
    used = tokenizer_of(tokenizer, "qwen3")
    example = chat(say("Which ferry is oldest?", "The Ada."))
    quiet = Template(used, "chat", template_kwargs={"enable_thinking": False})
    found = quiet.encode(example)
    assert texts_in_loss(used, found) == ["The Ada.<|im_end|>"]
    assert used.decode(found.ids[: found.prompt_length]).endswith(f"assistant\n{EMPTY}")
    assert quiet.encode_turns(example.turns[:1]) == found.ids[: found.prompt_length]
    assert quiet.opening_ids() == []
    assert found.asked_otherwise == 0
    several = quiet.encode(chat(say("Which ferry is oldest?", "The Ada.", "Sure?", "Yes.")))
    assert several.asked_otherwise == 1  # the template writes no thought before the first, and asks with one
    assert quiet.describe() != Template(used, "chat").describe()
    unread = Template(used, "chat", template_kwargs={"enable_thinking": True, "reasoning_efort": "low"}).unread_kwargs()
    assert unread == ["reasoning_efort"]
    (told,) = check_template_kwargs(unread)
    assert told.level == "warning"
    assert "the template reads no reasoning_efort" in told.message
    assert check_template_kwargs([]) == []


def test_a_prompt_that_no_answer_follows_is_told(tokenizer: Any, tmp_path: Path) -> None:
    used = tokenizer_of(tokenizer, "r1distill")
    table = prepared(tmp_path, used, [{"messages": say(f"Which {i}?", f"The {i}.")} for i in range(3)])
    assert kinds(table)["asked_otherwise"] == 3
    assert "do not begin where the template's generation prompt ends" in str(table.findings)
    thinks = say("Which ferry?", "<think>\nOf 1800.\n</think>\n\nThe Ada.")
    with pytest.raises(
        RowError, match=r"drops or rewrites what the assistant says or thinks in turn 2 → .*take it out"
    ):
        Template(used, "chat").encode(chat(thinks))


def test_mistral_asks_for_earlier_turns_otherwise(tokenizer: Any) -> None:
    """It writes the tools before the last user turn only."""
    used = tokenizer_of(tokenizer, "mistral")
    once = trajectory(1)
    again = [{"role": "user", "content": "Once more."}, *once[1:]]
    found = Template(used, "chat").encode(chat([*once, *again], tools=TOOLS))
    said = '[TOOL_CALLS][{"name": "register", "arguments": {"kind": "lamp", "no": 1}, "id": "abcdefghi"}]<|im_end|>'
    assert texts_in_loss(used, found) == [said, " That of 1800.<|im_end|>"] * 2
    assert found.asked_otherwise > 0
    assert Template(used, "chat").encode(chat([*once, *once], tools=TOOLS)).asked_otherwise == 0  # it finds it twice
    alone = Template(used, "chat").encode(chat(trajectory(3), tools=TOOLS))
    assert texts_in_loss(used, alone) == [said] * 3 + [" That of 1800.<|im_end|>"]
    assert alone.asked_otherwise == 0


def test_turns_that_no_token_ends_are_told(tokenizer: Any, tmp_path: Path) -> None:
    used = tokenizer_of(tokenizer, "glm45")
    table = prepared(tmp_path, used, [{"messages": trajectory(2), "tools": TOOLS}] * 2)
    assert kinds(table)["unended_turn"] == 2
    assert "4 answers without an end token of their own" in str(table.findings)


@pytest.mark.parametrize("name", ["glm45", "harmony", "qwen3"])
def test_one_answer_at_other_places_is_no_other_answer(tokenizer: Any, tmp_path: Path, name: str) -> None:
    used = tokenizer_of(tokenizer, name)
    rows = []
    for i in range(6):
        turns = say(f"Which ferry number {i}?", "The Ada.", "Sure?", "Yes.", "Why?", "It says so.")
        rows += [{"messages": turns[:n]} for n in (2, 4, 6)]
    assert "other_answer" not in kinds(prepared(tmp_path, used, rows))
    rows.append({"messages": say("Which ferry number 0?", "The Bea.")})
    assert kinds(prepared(tmp_path, used, rows))["other_answer"] == 1


def test_thoughts(tokenizer: Any, tmp_path: Path) -> None:
    used = tokenizer_of(tokenizer, "qwen3")
    thinks = "<think>\n{}\n</think>\n\n{}"
    turns = say("Which?", thinks.format("Of 1800.", "The Ada."), "Sure?", thinks.format("Hm.", "Yes."))
    found = Template(used, "chat").encode(chat(turns))
    assert texts_in_loss(used, found) == ["The Ada.<|im_end|>", "<think>\nHm.\n</think>\n\nYes.<|im_end|>"]
    fields = say("Which?", "The Ada.", "Sure?", "Yes.")
    for place, thought in ((1, "Of 1800."), (3, "Hm.")):
        fields[place]["reasoning_content"] = thought
    assert Template(used, "chat").encode(chat(fields)).ids == found.ids
    table = prepared(tmp_path, used, [{"messages": turns}, {"messages": say("What?", "That.")}])
    assert {kind: kinds(table)[kind] for kind in ("lost_thoughts", "no_thoughts")} == {
        "lost_thoughts": 1,
        "no_thoughts": 1,
    }
    assert "1 thoughts of earlier turns" in str(table.findings)
    whole = Template(tokenizer, "chat").encode(chat(turns[:2]))  # it leaves them where they are
    assert texts_in_loss(tokenizer, whole) == ["<think>\nOf 1800.\n</think>\n\nThe Ada.<|im_end|>"]


def test_the_turns_of_a_row_that_is_split_are_counted_once(tokenizer: Any, tmp_path: Path) -> None:
    used = tokenizer_of(tokenizer, "qwen3")
    turns = say(*(text for i in range(8) for text in (f"Which ferry number {i}?", "The Ada, as it says.")))
    for turn in turns[1::2]:
        turn["reasoning_content"] = "Of 1800."
    table = prepared(tmp_path, used, [{"messages": turns}], max_length=64, on_too_long="split")
    assert len(table) > 2
    assert {k: n for k, n in kinds(table).items() if k in ("lost_thoughts", "no_thoughts", "split")} == {
        "lost_thoughts": 1,
        "split": 1,
    }
    assert "7 thoughts of earlier turns" in str(table.findings)


def test_an_answer_that_begins_with_a_newline_and_an_indent(tokenizer: Any) -> None:
    used = tokenizer_of(tokenizer, "qwen3")
    code = "\n    def f():\n        return 0\n"
    found = Template(used, "chat").encode(chat(say("Write f.", code)))
    assert texts_in_loss(used, found) == [f"{EMPTY}{code[1:]}<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen3", "glm45", "harmony", "mistral"])
def test_arguments_in_the_form_that_the_template_takes(tokenizer: Any, name: str) -> None:
    used = tokenizer_of(tokenizer, name)
    given = {"kind": "lamp", "no": 1}
    first, second = (
        Template(used, "chat").encode(chat(trajectory(2, arguments), tools=TOOLS))
        for arguments in (given, json.dumps(given))
    )
    if name != "mistral":  # it writes the string as it is, quoted
        assert first == second


def test_a_tool_result_that_is_an_object_is_its_json(tokenizer: Any) -> None:
    used = tokenizer_of(tokenizer, "qwen3")
    answer = {"role": "assistant", "content": "That of 1800."}
    results: tuple[Any, ...] = ({"year": 1800, "é": [1, None]}, '{"year": 1800, "é": [1, null]}')
    one, other = (
        Template(used, "chat").encode(chat([*say("Which?"), *called("clock", {}, result), answer]))
        for result in results
    )
    assert one == other


def test_a_conversation_is_rendered_a_bounded_number_of_times(tokenizer: Any) -> None:
    for name in ("qwen3", "glm45", "harmony", "mistral"):
        counts = []
        for rounds in (5, 60):
            used = tokenizer_of(tokenizer, name)
            rendered = Counted(used.apply_chat_template)
            template, used.apply_chat_template = Template(used, "chat"), rendered
            found = template.encode(chat(trajectory(rounds), tools=TOOLS))
            assert len(texts_in_loss(used, found)) == rounds + 1
            counts.append(rendered.times)
        assert counts[1] <= counts[0] <= 12, name


def test_a_token_that_reaches_over_the_prompt_is_cut(tokenizer: Any) -> None:
    """Two line breaks are one token: the prompt ends in one, the answer begins with one."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    vocabulary["ĊĊ"] = len(vocabulary)
    tree["model"]["merges"].append(["Ċ", "Ċ"])
    used = copy.deepcopy(tokenizer)
    used._tokenizer = Tokenizer.from_str(json.dumps(tree))
    assert len(used("\n\n ").input_ids) == 2
    example = chat(say("Write f.", "\n    def f():", "Again.", "\n    def f():"))
    template = Template(used, "chat")
    found = template.encode(example)
    assert texts_in_loss(used, found) == ["\n    def f():<|im_end|>"] * 2
    assert found.asked_otherwise == 0
    for turn, length in ((1, found.prompt_prefix_length), (3, found.prompt_length)):
        header = used("<|im_start|>assistant\n").input_ids
        assert found.ids[length - len(header) : length] == header
        assert template.encode_turns(example.turns[:turn])[-len(header) :] == header
    assert used.decode(found.ids) == used.decode(Template(tokenizer, "chat").encode(example).ids)
    assert found.ids[: found.prompt_prefix_length] == template.encode_turns(example.turns[:1])
