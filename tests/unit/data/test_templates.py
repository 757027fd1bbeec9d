"""Token ids and label masks, against the stock tokenizer and against positions of characters in the rendering."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizers import LLAMA_LIKE, adds_bos, sentencepiece_like, with_template
from trainer.data.batching.micro_batch import Tokens, collate_padded
from trainer.data.formats.turns import Example, Turn
from trainer.data.sources.rows import RowError
from trainer.data.templates.encoded import Encoded
from trainer.data.templates.template import Template
from trainer.errors import DataError
from trainer.models.embedded.tiny import CHATML

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TASK = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_WITH_INPUT = (
    f"{TASK}, paired with an input that provides further context. {WRITE}### Input:\n{{input}}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = f"{TASK}. {WRITE}### Response:\n"

many = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
parts = (
    "a",
    " ",
    "\n",
    "\r\n",
    "the text",
    "é",
    "中文",
    "日本語。",
    "😀",
    "👩‍👩‍👧",
    "مرحبا",
    "\u200b",
    "\ufeff",
    "e\u0301",
    "\x00",
    "\ue0000\ue001",
)
pieces = st.sampled_from(parts) | st.text(max_size=6)
plain_texts = st.lists(pieces, max_size=5).map("".join)
hostile = ("<|im_", "end|>", "<|", "|>", "im_start", "<|im_end|>\n<|im_start|>assistant\n", "{{ x }}", "{% raw %}")
hostile_texts = st.lists(pieces | st.sampled_from(SPECIAL + hostile), max_size=6).map("".join)


def example(instruction: str, output: str, input: str = "") -> Example:
    return Example((Turn("user", instruction, input), Turn("assistant", output, answer=True)), "rows.jsonl:1", 1)


def tokens_in_loss(encoded: Encoded) -> list[int]:
    return [token for token, label in zip(encoded.ids, encoded.loss_mask, strict=True) if label]


def user_text(instruction: str, input: str) -> str:
    return f"{instruction}\n\n{input}" if input else instruction


def without_specials(tokenizer: Any) -> Any:
    """The same merges with no special token at all: whatever it is given is text."""
    from tokenizers import Tokenizer

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(tree))


@many
@given(plain_texts, plain_texts, plain_texts)
def test_chatml_equals_the_stock_ids_and_the_mask_by_characters(
    tokenizer: Any, instruction: str, input: str, answer: str
) -> None:
    found = Template(tokenizer, "chat").encode(example(instruction, answer, input))
    user = user_text(instruction, input)
    prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    stock = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    newline = tokenizer("\n").input_ids
    assert found.ids + newline == stock  # the template's last newline is left out
    spans = tokenizer(f"{prompt}{answer}<|im_end|>", return_offsets_mapping=True, add_special_tokens=False)
    begin, end = len(prompt), len(prompt) + len(answer) + len("<|im_end|>")
    assert found.loss_mask == [b < end and e > begin for b, e in spans["offset_mapping"]]
    assert found.prompt_length == found.loss_mask.index(True)
    assert tokenizer.decode(tokens_in_loss(found)) == f"{answer}<|im_end|>"


@many
@given(hostile_texts, hostile_texts, hostile_texts)
def test_text_is_never_read_as_control_tokens(tokenizer: Any, instruction: str, input: str, answer: str) -> None:
    found = Template(tokenizer, "chat").encode(example(instruction, answer, input))
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    plain = without_specials(tokenizer)

    def ids(text: str) -> list[int]:
        return plain.encode(text, add_special_tokens=False).ids

    prompt = [start, *ids(f"user\n{user_text(instruction, input)}"), end, *ids("\n"), start]
    answered = ids(f"assistant\n{answer}")
    assert found.ids == [*prompt, *answered, end]
    assert [t for t in found.ids if t < len(SPECIAL)] == [start, end, start, end]
    assert tokenizer.decode(tokens_in_loss(found)) == f"{answer}<|im_end|>"
    head = len(prompt) + len(ids("assistant\n"))
    assert found.loss_mask == [i >= head for i in range(len(found.ids))]


@many
@given(hostile_texts, hostile_texts, hostile_texts, st.sampled_from(["chat", "alpaca", "alpaca_short"]), st.booleans())
def test_a_prompt_is_how_its_training_row_begins(
    tokenizer: Any, instruction: str, input: str, answer: str, name: str, as_system: bool
) -> None:
    template = Template(tokenizer, name, "system" if as_system else "user")
    found = template.encode(example(instruction, answer, input))
    assert template.encode_prompt(instruction, input) == found.ids[: found.prompt_length]
    assert template.end_ids() == found.ids[-1:] == tokens_in_loss(found)[-1:] == [tokenizer.eos_token_id]


@many
@given(hostile_texts, hostile_texts, hostile_texts)
def test_alpaca_is_its_text_to_the_letter(tokenizer: Any, instruction: str, input: str, answer: str) -> None:
    plain = without_specials(tokenizer)
    layout = ALPACA_WITH_INPUT if input else ALPACA_WITHOUT_INPUT
    prompt = layout.format(instruction=instruction, input=input)
    for name, begin in (("alpaca", 0), ("alpaca_short", prompt.index("### Instruction:"))):
        found = Template(tokenizer, name).encode(example(instruction, answer, input))
        assert found.ids == [*plain.encode(prompt[begin:] + answer).ids, tokenizer.eos_token_id]
        assert tokenizer.decode(tokens_in_loss(found)) == f"{answer}<|im_end|>"


def test_alpaca_begins_with_bos_where_the_tokenizer_does(tokenizer: Any) -> None:
    begins = adds_bos(tokenizer, "<|endoftext|>")
    bos = begins.bos_token_id
    for text in ("Say a.", "Say <|endoftext|>."):  # read in one, and in stretches
        with_bos, without = (Template(t, "alpaca").encode(example(text, "a")) for t in (begins, tokenizer))
        assert with_bos.ids == [bos, *without.ids]
        assert with_bos.loss_mask == [False, *without.loss_mask]
        assert with_bos.prompt_length == without.prompt_length + 1
    stock = begins(ALPACA_WITHOUT_INPUT.format(instruction="Say a.") + "a<|im_end|>").input_ids
    assert Template(begins, "alpaca").encode(example("Say a.", "a")).ids == stock
    assert Template(begins, "chat").encode(example("Say a.", "a")).ids.count(bos) == 0  # the chat template writes none


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
@pytest.mark.parametrize("layout", [CHATML, LLAMA_LIKE])
def test_ids_are_what_others_will_serve_the_model_with(prepend: str, layout: str) -> None:
    """A tokenizer that treats the text's start unlike its middle: cut at control tokens it would read otherwise."""
    tokenizer = sentencepiece_like(prepend, layout)
    for name in ("chat", "alpaca"):
        template = Template(tokenizer, name)
        found = template.encode(example("What is the capital of France?", "the capital 中"))
        text = ALPACA_WITHOUT_INPUT.format(instruction="What is the capital of France?") + "the capital 中</s>"
        if name == "chat":
            turns = [{"role": "user", "content": "What is the capital of France?"}]
            turns += [{"role": "assistant", "content": "the capital 中"}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert found.ids == tokenizer(text, add_special_tokens=False).input_ids[: len(found.ids)]
        end = "<|im_end|>" if name == "chat" and layout == CHATML else "</s>"
        assert tokenizer.decode(tokens_in_loss(found)).strip() in (f"the capital 中{end}", f"the capital 中 {end}")
        assert tokens_in_loss(found)[-1] == tokenizer.convert_tokens_to_ids(end)
        hostile = template.encode(example("<s></s><|im_end|>", "</s>a<s>"))
        controls = {tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")}
        assert [i for i in hostile.ids if i in controls] == [i for i in found.ids if i in controls]


def test_the_end_token_is_in_the_loss_though_it_doubles_as_padding(tokenizer: Any) -> None:
    doubled = copy.deepcopy(tokenizer)
    doubled.pad_token = doubled.eos_token
    rows = [Template(doubled, "chat").encode(example("q", a)) for a in ("short", "a longer answer <|im_end|>")]
    batch = collate_padded(
        [Tokens(np.asarray(r.ids), np.asarray(r.loss_mask)) for r in rows], [0, 1], doubled.pad_token_id
    )
    assert (batch.target == doubled.eos_token_id).sum() == 2
    assert batch.target.tolist() == [*tokens_in_loss(rows[0]), *tokens_in_loss(rows[1])]
    width = batch.input_ids.shape[1]
    assert all(int(s) % width < len(rows[int(s) // width].ids) - 1 for s in batch.source)


@pytest.mark.parametrize("role", ["user", "system"])
def test_alpaca_role(tokenizer: Any, role: str) -> None:
    template = Template(tokenizer, "chat", alpaca_role=role)
    rendered = tokenizer.decode(template.encode(example("Translate.", "hola", "hello")).ids)
    if role == "user":
        turns = "<|im_start|>user\nTranslate.\n\nhello<|im_end|>\n"
    else:
        turns = "<|im_start|>system\nTranslate.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert rendered == f"{turns}<|im_start|>assistant\nhola<|im_end|>"
    alone = tokenizer.decode(template.encode(example("Greet.", "hola")).ids)
    assert alone == "<|im_start|>user\nGreet.<|im_end|>\n<|im_start|>assistant\nhola<|im_end|>"


@pytest.mark.parametrize("trimmed", ["all", "user", "assistant"])
def test_a_template_that_trims(tokenizer: Any, trimmed: str) -> None:
    reason = {"all": "true", "user": "message.role == 'user'", "assistant": "message.role == 'assistant'"}[trimmed]
    trims = with_template(
        tokenizer,
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content | trim if " + reason + " else message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    template = Template(trims, "chat")
    for question, answer in ((" q\n", "\n a "), ("q", "a"), ("\u3000q", "a\t")):
        found = template.encode(example(question, answer))
        q = question.strip() if trimmed != "assistant" else question
        a = answer.strip() if trimmed != "user" else answer
        expected = f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"
        assert trims.decode(found.ids) == expected
        assert trims.decode(tokens_in_loss(found)) == f"{a}<|im_end|>"
        assert template.encode_prompt(question) == found.ids[: found.prompt_length]


def test_a_default_system_turn_is_part_of_the_prompt(tokenizer: Any) -> None:
    head = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    template = Template(with_template(tokenizer, head + CHATML), "chat", alpaca_role="system")
    found = template.encode(example("q", "a"))
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.ids) == f"{text}a<|im_end|>"
    assert tokenizer.decode(tokens_in_loss(found)) == "a<|im_end|>"
    assert template.encode_prompt("q") == found.ids[: found.prompt_length]
    assert "Be kind" not in tokenizer.decode(template.encode(example("q", "a", "i")).ids)


REFUSED = {
    "upper case": CHATML.replace("message['content']", "message['content'] | upper"),
    "cuts": CHATML.replace("message['content']", "message['content'][:5]"),
    "escapes": CHATML.replace("message['content']", "message['content'] | replace('<', '&lt;')"),
    "drops the thought": CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
    "twice": CHATML.replace("message['content']", "message['content'] + message['content']"),
    "drops the answer": CHATML.replace("in messages", "in messages if message.role != 'assistant'"),
    "turns round": CHATML.replace("in messages", "in messages | reverse"),
    "refuses": "{{ raise_exception('only poems') }}",
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_template_that_changes_the_text_is_refused(tokenizer: Any, how: str) -> None:
    template = Template(with_template(tokenizer, REFUSED[how]), "chat")
    with pytest.raises(DataError) as caught:
        template.encode(example("a question < 3", "<think>so</think>an answer"))
    assert "template" in str(caught.value)
    assert "→" in str(caught.value)


def test_a_dropped_system_turn_names_the_other_role(tokenizer: Any) -> None:
    drops = with_template(tokenizer, CHATML.replace("in messages", "in messages if message.role != 'system'"))
    with pytest.raises(DataError, match=r"drops a turn of system → user → assistant → data\.alpaca_role=user"):
        Template(drops, "chat", alpaca_role="system").encode(example("q", "a", "i"))


@pytest.mark.parametrize("after", ["", "\n", "\n\n"])
def test_without_an_end_token_eos_is_added(tokenizer: Any, after: str) -> None:
    layout = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + after.replace("\n", "\\n") + "' }}{% endfor %}"
    layout += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    found = Template(with_template(tokenizer, layout), "chat").encode(example("q", "a"))
    assert tokenizer.decode(found.ids) == f"user: q{after}assistant: a<|im_end|>"
    assert tokens_in_loss(found)[-1] == tokenizer.eos_token_id


def test_a_space_before_the_end_token_is_in_the_loss(tokenizer: Any) -> None:
    found = Template(with_template(tokenizer, LLAMA_LIKE.replace("bos_token", "''")), "chat").encode(example("q", "a"))
    assert tokenizer.decode(found.ids) == "[INST] q [/INST] a <|im_end|>"
    assert tokenizer.decode(tokens_in_loss(found)) == " a <|im_end|>"  # the space is the answer's first


def test_what_a_tokenizer_must_have(tokenizer: Any) -> None:
    bare = Template(with_template(tokenizer, ""), "chat")  # enough for plain text, which needs no chat template
    assert bare.encode(Example((), "rows.txt:1", 1, text="a")).ids == [*tokenizer("a").input_ids, *bare.end_ids()]
    with pytest.raises(DataError, match=r"no chat template → data\.template=alpaca") as caught:
        bare.encode(example("q", "a"))
    assert not isinstance(caught.value, RowError)  # it is not the row's fault
    Template(with_template(tokenizer, ""), "alpaca").encode(example("q", "a"))
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        Template(endless, "chat")

    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="no character offsets"):
        Template(Slow(), "chat")
