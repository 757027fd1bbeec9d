"""Conversations of several turns: what is in the loss, against transformers' own mask and against decoded texts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.conversations import KYOTO, MADRID, PLAIN, SYSTEM, chat, stock, texts_in_loss
from tests.helpers.tokenizers import (
    LLAMA3_LIKE,
    LLAMA_LIKE,
    QWEN_LIKE,
    adds_bos,
    llama3_like,
    sentencepiece_like,
    with_template,
)
from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Example, Turn
from trainer.data.sources.rows import Row, RowError
from trainer.data.templates.template import Template
from trainer.errors import DataError
from trainer.models.embedded.tiny import CHATML

many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def kinds(tokenizer: Any) -> dict[str, tuple[Any, str]]:
    """Tokenizer and end token of each kind."""
    return {
        "ChatML": (tokenizer, "<|im_end|>"),
        "Qwen 2.5": (with_template(tokenizer, QWEN_LIKE), "<|im_end|>"),
        "Llama 3": (llama3_like(), "<|eot_id|>"),
        "ChatML, sentencepiece": (sentencepiece_like("first"), "<|im_end|>"),
    }


@pytest.mark.parametrize("kind", ["ChatML", "Qwen 2.5", "Llama 3", "ChatML, sentencepiece"])
@pytest.mark.parametrize("messages", [KYOTO, MADRID], ids=["Kyoto", "Madrid"])
def test_every_answer_and_its_end_token_are_in_the_loss(tokenizer: Any, kind: str, messages: Any) -> None:
    used, end = kinds(tokenizer)[kind]
    found = Template(used, "chat").encode(chat(messages))
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert texts_in_loss(used, found) == [f"{a}{end}" for a in answers]
    whole = used.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert found.ids == whole[: len(found.ids)]
    assert used.decode(whole[len(found.ids) :]).strip() == ""
    prompt = used.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert found.ids[: found.prompt_length] == prompt
    assert found.prompt_prefix_length == found.loss_mask.index(True)
    assert Template(used, "chat").encode_turns(chat(messages).turns[:-1]) == prompt
    assert found.ids.count(used.bos_token_id) == (kind == "Llama 3")


@pytest.mark.parametrize("template", [QWEN_LIKE, LLAMA3_LIKE])
@pytest.mark.parametrize("messages", [KYOTO, MADRID], ids=["Kyoto", "Madrid"])
def test_labels_are_the_mask_of_transformers(tokenizer: Any, template: str, messages: Any) -> None:
    used = llama3_like() if template == LLAMA3_LIKE else with_template(tokenizer, template)
    expected = stock(used, messages)
    found = Template(used, "chat").encode(chat(messages))
    assert found.ids == expected["input_ids"][: len(found.ids)]
    assert [int(label) for label in found.loss_mask] == expected["assistant_masks"][: len(found.ids)]
    assert sum(expected["assistant_masks"]) == sum(found.loss_mask)


def test_llama_2(tokenizer: Any) -> None:
    used = sentencepiece_like("first", LLAMA_LIKE)
    messages = [SYSTEM, *PLAIN]
    found = Template(used, "chat").encode(chat(messages))
    assert found.ids == used.apply_chat_template(messages)["input_ids"]
    assert [t.strip() for t in texts_in_loss(used, found)] == [f"{m['content']} </s>" for m in PLAIN[1::2]]
    assert found.ids.count(used.bos_token_id) == 2  # one a round, as Llama 2 writes them, and none of our own


texts = st.text(max_size=12) | st.sampled_from(
    ["a\r\nb", " trimmed ", "{{ 7*7 }}", "\x00", "e\u0301", "👩‍👩‍👧", "<tool_call>"]
)
spoken = texts.filter(lambda t: t.strip())


@many
@given(st.lists(st.tuples(spoken, spoken), min_size=1, max_size=4), st.booleans())
def test_any_text_is_in_the_loss_where_it_stands(tokenizer: Any, rounds: list[tuple[str, str]], trims: bool) -> None:
    used = llama3_like() if trims else with_template(tokenizer, QWEN_LIKE)
    messages = [{"role": r, "content": t} for pair in rounds for r, t in zip(("user", "assistant"), pair, strict=True)]
    found = Template(used, "chat").encode(chat(messages))
    expected = stock(used, messages)
    assert found.ids == expected["input_ids"][: len(found.ids)]
    assert [int(label) for label in found.loss_mask] == expected["assistant_masks"][: len(found.ids)]
    assert not any(expected["assistant_masks"][len(found.ids) :])
    end = "<|eot_id|>" if trims else "<|im_end|>"
    said = [answer.strip() if trims else answer for _, answer in rounds]
    assert texts_in_loss(used, found) == [f"{answer}{end}" for answer in said]


@pytest.mark.parametrize(
    ("train_on", "rows"),
    [
        ("completion", ["9<|im_end|>", "7<|im_end|>"]),
        ("assistant", ["1<|im_end|>", "9<|im_end|>", "7<|im_end|>"]),
        ("last_assistant", ["7<|im_end|>"]),
    ],
)
def test_train_on_and_weights(tokenizer: Any, train_on: str, rows: list[str]) -> None:
    turns = [Turn("user", "a"), Turn("assistant", "1"), Turn("user", "b"), Turn("assistant", "9", answer=True)]
    turns += [Turn("user", "c"), Turn("assistant", "5", answer=True, weight=0)]
    turns += [Turn("user", "d"), Turn("assistant", "7", answer=True), Turn("user", "e")]
    template = Template(tokenizer, "chat", train_on=train_on)
    found = template.encode(Example(tuple(turns), "x:1", 1))
    assert texts_in_loss(tokenizer, found) == rows
    assert tokenizer.decode(found.ids).endswith("7<|im_end|>")
    assert tokenizer.decode(found.ids[: found.prompt_length]).endswith("d<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(found.ids[found.prompt_prefix_length :]).startswith(rows[0])
    learns_all = Template(tokenizer, "chat", train_on="all")
    assert learns_all.end_ids() == template.end_ids()
    every = learns_all.encode(Example(tuple(turns), "x:1", 1))
    assert all(every.loss_mask)
    assert every.ids[: len(found.ids)] == found.ids
    assert tokenizer.decode(every.ids).endswith("7<|im_end|>\n<|im_start|>user\ne<|im_end|>\n")
    assert every.prompt_length == found.prompt_length
    assert (
        every.prompt_prefix_length
        == Template(tokenizer, "chat").encode(Example(tuple(turns), "x:1", 1)).prompt_prefix_length
    )


@pytest.mark.parametrize("train_on", ["completion", "assistant", "last_assistant"])
def test_a_row_of_weight_0_teaches_nothing(tokenizer: Any, train_on: str) -> None:
    row = chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}])
    with pytest.raises(RowError) as caught:
        Template(tokenizer, "chat", train_on=train_on).encode(row)
    assert caught.value.code == "empty_loss_mask"


def test_a_last_answer_of_weight_0_is_neither_in_the_loss_nor_scored(tokenizer: Any) -> None:
    row = chat([*PLAIN[:2], PLAIN[2], {**PLAIN[3], "weight": 0}])
    found = Template(tokenizer, "chat").encode(row)
    assert row.answer == PLAIN[1]["content"]
    assert tokenizer.decode(found.ids[found.prompt_length :]) == f"{row.answer}<|im_end|>"


def test_an_own_template(tokenizer: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(QWEN_LIKE)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    template, usual = Template(bare, str(own)), Template(with_template(tokenizer, QWEN_LIKE), "chat")
    assert template.encode(chat(KYOTO)) == usual.encode(chat(KYOTO))
    assert template.encode_prompt("a", "b") == usual.encode_prompt("a", "b")
    assert template.chat_template == usual.chat_template == QWEN_LIKE
    assert template.end_ids() == usual.end_ids()
    before = template.describe()
    own.write_text(QWEN_LIKE.replace("helpful", "kind"))
    assert Template(bare, str(own)).describe() != before
    assert Template(tokenizer, "alpaca").chat_template is None
    own.write_text("{% for m in messages %}{{ m.content }}")
    with pytest.raises(DataError, match=r"own\.jinja: is no chat template: line 1"):
        Template(bare, str(own))
    own.write_bytes(b"\xff")
    for path in (own, tmp_path / "none.jinja"):
        with pytest.raises(DataError, match=r"data\.template=.*cannot be read"):
            Template(bare, str(path))
    with pytest.raises(DataError, match="must be one of chat, alpaca, alpaca_short, plain, or a file"):
        Template(bare, "chatml")


def test_turns_that_the_template_refuses(tokenizer: Any) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
    with pytest.raises(RowError, match=r"refuses the turns system → user.*begin with the user"):
        Template(with_template(tokenizer, strict), "chat").encode(chat(KYOTO))
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert texts_in_loss(tokenizer, Template(tokenizer, "chat").encode(chat(two))) == ["c<|im_end|>"]


def test_system_text_inside_a_later_user_turn(tokenizer: Any) -> None:
    """Mistral's templates put it into the last user turn."""
    moves = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' }}"
        "{% if loop.index0 + 2 == messages | length %}{{ messages[0].content + '\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    found = Template(with_template(tokenizer, moves), "chat").encode(chat([SYSTEM, *PLAIN]))
    assert texts_in_loss(tokenizer, found) == [f"{m['content']}<|im_end|>" for m in PLAIN[1::2]]


def test_the_next_turns_header_is_not_in_the_loss(tokenizer: Any) -> None:
    """Without an end token of its own, an answer in the middle is followed by the header of the next turn."""
    opens = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
    found = Template(with_template(tokenizer, opens), "chat").encode(chat(PLAIN))
    assert texts_in_loss(tokenizer, found) == [PLAIN[1]["content"], f"{PLAIN[3]['content']}<|im_end|>"]


def test_many_turns_of_spaces_are_placed_quickly(tokenizer: Any) -> None:
    trims = with_template(tokenizer, CHATML.replace("message['content']", "message['content'] | trim"))
    messages = [{"role": r, "content": f" {i} \n"} for i in range(60) for r in ("user", "assistant")]
    found = Template(trims, "chat").encode(chat(messages))
    assert texts_in_loss(tokenizer, found) == [f"{i}<|im_end|>" for i in range(60)]


def test_alpaca_history_and_system(tokenizer: Any) -> None:
    fields = {"instruction": "c", "input": "d", "output": "e", "system": "S", "history": [["a", "b"]]}
    row = parse_example(Row(fields, "x:1", 1), "alpaca", {})
    begins = adds_bos(tokenizer, "<|endoftext|>")
    for name, preamble in (("alpaca", "Below is an instruction"), ("alpaca_short", "### Instruction")):
        found = Template(begins, name, train_on="assistant").encode(row)
        text = begins.decode(found.ids)
        assert text.startswith(f"<|endoftext|>S\n\n{preamble}")
        assert text.endswith(
            "### Instruction:\na\n\n### Response:\nb<|im_end|>\n\n"
            "### Instruction:\nc\n\n### Input:\nd\n\n### Response:\ne<|im_end|>"
        )
        assert texts_in_loss(begins, found) == ["b<|im_end|>", "e<|im_end|>"]
        assert texts_in_loss(begins, Template(begins, name).encode(row)) == ["e<|im_end|>"]
        assert found.ids.count(begins.bos_token_id) == 1
        assert Template(begins, name).encode_turns(row.turns[:-1]) == found.ids[: found.prompt_length]
    system = Template(tokenizer, "chat", alpaca_role="system").encode(row)
    assert tokenizer.decode(system.ids).startswith(
        "<|im_start|>system\nS\n\nc<|im_end|>\n<|im_start|>user\na<|im_end|>"
    )
    assert texts_in_loss(tokenizer, system) == ["e<|im_end|>"]


def test_plain(tokenizer: Any) -> None:
    begins = adds_bos(tokenizer, "<|endoftext|>")
    row = parse_example(Row({"prompt": "2 + 2 =", "completion": " 4"}, "x:1", 1), "prompt_completion", {})
    found = Template(begins, "plain").encode(row)
    assert begins.decode(found.ids) == "<|endoftext|>2 + 2 = 4<|im_end|>"
    assert texts_in_loss(begins, found) == [" 4<|im_end|>"]
    several = Template(begins, "plain", train_on="assistant").encode(chat([SYSTEM, *PLAIN]))
    a, b, c, d = (m["content"] for m in PLAIN)
    assert begins.decode(several.ids) == f"<|endoftext|>{SYSTEM['content']}\n{a}{b}<|im_end|>{c}{d}<|im_end|>"
    for name in ("chat", "alpaca", "plain"):
        text = Template(begins, name).encode(Example((), "x:1", 1, text="words <|im_end|>\r\n"))
        assert begins.decode(text.ids) == "<|endoftext|>words <|im_end|>\r\n<|im_end|>"
        assert text.ids.count(begins.eos_token_id) == 1
        assert all(text.loss_mask)
        assert (text.prompt_length, text.prompt_prefix_length) == (0, len(text.ids))


@pytest.mark.parametrize("template", ["{{ messages | length }}", "{{ messages[0].content }}", "nothing"])
def test_a_template_that_drops_turns_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(RowError, match="drops a turn of user → assistant"):
        Template(with_template(tokenizer, template), "chat").encode(chat(PLAIN))
